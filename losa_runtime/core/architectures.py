"""Which architectures (the name in config.json) are served, and why the others are not.

Plain tables. The classes behind the served ones are in `losa_runtime.models.model`; a test keeps the two in step.
"""

from __future__ import annotations

from losa_runtime.core.families import a2d, fast_dllm, llada2, sdar, sdar_moe
from losa_runtime.core.families.family import Family

SUPPORTED: dict[str, Family] = {
    "SDARForCausalLM": sdar.FAMILY,
    "SDARMoeForCausalLM": sdar_moe.FAMILY,
    "LLaDA2MoeModelLM": llada2.FAMILY,
    "Fast_dLLM_QwenForCausalLM": fast_dllm.FAMILY,
    "A2DQwen3LMHeadModel": a2d.FAMILY,
}

_FULL_ATTENTION = (
    "a full-attention diffusion model: earlier tokens attend to later ones, so the K/V of a prefix change with every "
    "later token and no exact prefix cache is possible"
)
_AUTOREGRESSIVE = "an autoregressive model: it predicts the next token and cannot fill masked blocks"
_OTHER_BACKBONE = "a block-diffusion model on a backbone that is not implemented; of A2D only the one on Qwen3 is"
REFUSED_ARCHITECTURES: dict[str, str] = {
    **dict.fromkeys(
        ("LLaDAModelLM", "LLaDAMoEModelLM", "LLaDAMoEModel", "DreamModel", "DreamForCausalLM"), _FULL_ATTENTION
    ),
    **dict.fromkeys(("A2DQwen2LMHeadModel", "A2DLlamaLMHeadModel"), _OTHER_BACKBONE),
    **dict.fromkeys(
        (
            *("Qwen2ForCausalLM", "Qwen3ForCausalLM", "Qwen2MoeForCausalLM", "Qwen3MoeForCausalLM", "LlamaForCausalLM"),
            *("MistralForCausalLM", "MixtralForCausalLM", "GemmaForCausalLM", "Gemma2ForCausalLM", "Gemma3ForCausalLM"),
            *("Phi3ForCausalLM", "GPT2LMHeadModel", "DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM"),
        ),
        _AUTOREGRESSIVE,
    ),
}
