"""The specification of a block-causal model: transformers' Qwen models under a dense 4-D mask, and a dense `attend`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from losa_runtime.layers.attention import AttendFn


def sees(length: int, block: int) -> Tensor:
    """Boolean [T, T]: row i may read column j, that is block(j) <= block(i)."""
    number = torch.arange(length) // block
    return number[:, None] >= number[None, :]


def dense_attend(block: int) -> AttendFn:
    """Block-causal attention by explicit softmax, one head after another."""

    def attend(layer: int, q_THD: Tensor, k_TGD: Tensor, v_TGD: Tensor) -> Tensor:
        visible = sees(q_THD.shape[0], block)
        share = q_THD.shape[1] // k_TGD.shape[1]
        heads = []
        for h in range(q_THD.shape[1]):
            scores = q_THD[:, h].double() @ k_TGD[:, h // share].double().T / q_THD.shape[2] ** 0.5
            weights = torch.softmax(scores.masked_fill(~visible, float("-inf")), dim=-1)
            heads.append(weights @ v_TGD[:, h // share].double())
        return torch.stack(heads, dim=1).to(q_THD.dtype)

    return attend


# architecture -> configuration and model of transformers that compute the same under the same mask
THEIRS = {
    "SDARForCausalLM": ("Qwen3Config", "Qwen3ForCausalLM"),
    "SDARMoeForCausalLM": ("Qwen3MoeConfig", "Qwen3MoeForCausalLM"),
    "Fast_dLLM_QwenForCausalLM": ("Qwen2Config", "Qwen2ForCausalLM"),
    "A2DQwen3LMHeadModel": ("Qwen3Config", "Qwen3ForCausalLM"),
}


def transformers_logits(folder: Path, tokens: Tensor, block: int, rope: dict[str, Any] | None = None) -> Tensor:
    """Logits float32 [T, V] of transformers' model with the checkpoint's weights and a block-causal mask."""
    import transformers

    raw = json.loads((folder / "config.json").read_text())
    config_name, model_name = THEIRS[raw.pop("architectures")[0]]
    theta = raw.pop("rope_theta")
    raw.pop("rope_scaling", None)
    raw = {k: v for k, v in raw.items() if k not in ("model_type", "dtype", "torch_dtype")}
    parameters = {"rope_type": "default", **(rope or {}), "rope_theta": theta}
    config = getattr(transformers, config_name)(**raw, rope_parameters=parameters)
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"
    model = getattr(transformers, model_name)(config).eval().float()
    tensors = {name: t.float() for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}
    missing, unexpected = model.load_state_dict(_stacked(tensors), strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}
    additive = torch.zeros(tokens.shape[0], tokens.shape[0]).masked_fill(~sees(tokens.shape[0], block), float("-inf"))
    with torch.no_grad():
        return model(input_ids=tokens[None], attention_mask=additive[None, None], use_cache=False).logits[0]


def _stacked(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Each layer's experts as transformers keeps them: in two tensors."""
    plain = {name: t for name, t in tensors.items() if ".experts." not in name}
    for layer in {name.partition(".experts.")[0] for name in tensors if ".experts." in name}:
        own = [name for name in tensors if name.startswith(f"{layer}.experts.")]
        each = [f"{layer}.experts.{e}" for e in range(len(own) // 3)]
        both = [torch.cat([tensors[f"{n}.gate_proj.weight"], tensors[f"{n}.up_proj.weight"]]) for n in each]
        plain[f"{layer}.experts.gate_up_proj"] = torch.stack(both)
        plain[f"{layer}.experts.down_proj"] = torch.stack([tensors[f"{n}.down_proj.weight"] for n in each])
    return plain
