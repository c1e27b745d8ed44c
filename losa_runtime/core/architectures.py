"""Which architectures (the name in config.json) are served, and why the others are not.

Plain tables. The classes behind the served ones are in `losa_runtime.models.model`; a test keeps the two in step.
"""

from __future__ import annotations

from typing import NamedTuple


class FamilyDefaults(NamedTuple):
    """What a family's released checkpoints leave out of config.json."""

    block_length: int
    mask_token_id: int


SUPPORTED: dict[str, FamilyDefaults] = {"SDARForCausalLM": FamilyDefaults(block_length=4, mask_token_id=151669)}

_FULL_ATTENTION = (
    "a full-attention diffusion model: earlier tokens attend to later ones, so the K/V of a prefix change with every "
    "later token and no exact prefix cache is possible"
)
_AUTOREGRESSIVE = "an autoregressive model: it predicts the next token and cannot fill masked blocks"
_EXPERTS = "a mixture-of-experts model; only dense models are implemented in this version"
REFUSED_ARCHITECTURES: dict[str, str] = {
    **dict.fromkeys(
        ("LLaDAModelLM", "LLaDAMoEModelLM", "LLaDAMoEModel", "DreamModel", "DreamForCausalLM"), _FULL_ATTENTION
    ),
    **dict.fromkeys(("SDARMoeForCausalLM", "LLaDA2MoeModelLM", "LLaDA2MoeForCausalLM"), _EXPERTS),
    "Fast_dLLM_QwenForCausalLM": "a model with shifted logits (position i is predicted at i-1), not implemented here",
    **dict.fromkeys(
        ("A2DQwen3LMHeadModel", "A2DQwen2LMHeadModel", "A2DLlamaLMHeadModel"),
        "a model whose blocks are anchored at a left-padded prompt, which is not implemented",
    ),
    **dict.fromkeys(
        (
            *("Qwen2ForCausalLM", "Qwen3ForCausalLM", "Qwen2MoeForCausalLM", "Qwen3MoeForCausalLM", "LlamaForCausalLM"),
            *("MistralForCausalLM", "MixtralForCausalLM", "GemmaForCausalLM", "Gemma2ForCausalLM", "Gemma3ForCausalLM"),
            *("Phi3ForCausalLM", "GPT2LMHeadModel", "DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM"),
        ),
        _AUTOREGRESSIVE,
    ),
}
