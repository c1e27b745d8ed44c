"""What is wrong in a folder of any family is named in one error: fields, tensors, and masks that no tokenizer has."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from losa_runtime import LLM
from losa_runtime.core.errors import CheckpointError, ConfigError
from losa_runtime.core.model_config import ModelConfig
from losa_runtime.models.model import load_model
from losa_runtime.models.random_checkpoint import write_random_checkpoint

MOE, LLADA, FAST, A2D = (
    *("SDARMoeForCausalLM", "LLaDA2MoeModelLM"),
    *("Fast_dLLM_QwenForCausalLM", "A2DQwen3LMHeadModel"),
)
Tensors = dict[str, torch.Tensor]


def write(folder: Path, architecture: str, **fields: Any) -> None:
    """A random folder of this family with changed fields in its config.json; a value of `...` removes one."""
    write_random_checkpoint(folder, architecture=architecture)
    (folder / "generation_config.json").unlink()
    raw = json.loads((folder / "config.json").read_text()) | fields
    (folder / "config.json").write_text(json.dumps({k: v for k, v in raw.items() if v is not ...}))


BAD_FIELDS: list[tuple[str, dict[str, Any], str]] = [
    (MOE, {"num_experts": ...}, "num_experts: found nothing, allowed: a value"),
    (MOE, {"num_experts_per_tok": 9}, "num_experts_per_tok: found 9, allowed: at most the 8 experts"),
    (MOE, {"moe_intermediate_size": "48"}, "moe_intermediate_size: found '48', allowed: a valid integer"),
    (MOE, {"norm_topk_prob": "yes"}, "norm_topk_prob: found 'yes'"),
    (MOE, {"decoder_sparse_step": 0}, "decoder_sparse_step: found 0, allowed: an integer of at least 1"),
    (MOE, {"mlp_only_layers": [2]}, "mlp_only_layers: found [2], allowed: layers below num_hidden_layers = 2"),
    (MOE, {"mlp_only_layers": "0"}, "mlp_only_layers: found '0', allowed: a list of integers"),
    (MOE, {"attention_bias": True}, "attention_bias: found True, allowed: false"),
    (LLADA, {"n_group": 3}, "n_group: found 3, allowed: what divides the 8 experts into groups of two or more"),
    (LLADA, {"topk_group": 5}, "topk_group: found 5, allowed: at most the 4 groups"),
    (LLADA, {"topk_group": 1, "num_experts_per_tok": 3}, "topk_group: found 1, allowed: so many groups of 2"),
    (LLADA, {"routed_scaling_factor": 0}, "routed_scaling_factor: found 0"),
    (LLADA, {"score_function": "softmax"}, "score_function: found 'softmax', allowed: \"sigmoid\""),
    (LLADA, {"use_qk_norm": False}, "use_qk_norm: found False, allowed: true"),
    (LLADA, {"use_qkv_bias": True}, "use_qkv_bias: found True, allowed: false"),
    (LLADA, {"first_k_dense_replace": 3}, "first_k_dense_replace: found 3, allowed: at most num_hidden_layers = 2"),
    (LLADA, {"partial_rotary_factor": ...}, "partial_rotary_factor: found None, allowed: the share of a head"),
    (LLADA, {"partial_rotary_factor": 1.5}, "partial_rotary_factor: found 1.5, allowed: a share of head_dim = 32"),
    (LLADA, {"rotary_dim": 8}, "rotary_dim: found 8, allowed: head_dim * partial_rotary_factor = 16"),
    (LLADA, {"delete_token_id": 7}, "delete_token_id: found 7, allowed: none (LLaDA2.2 chooses its experts per block"),
    (LLADA, {"mask_token_id": ...}, "mask_token_id: found 156895, allowed: ids inside the vocabulary"),
    (FAST, {"attention_bias": False}, "attention_bias: found False, allowed: true"),
    (FAST, {"bd_size": 8}, "bd_size: found 8, allowed: the same as block_size = 16"),
    (FAST, {"head_dim": ..., "hidden_size": 66}, "hidden_size: found 66, allowed: a multiple of num_attention_heads"),
    (A2D, {"right_shift_logits": True}, "right_shift_logits: found True, allowed: false"),
]


@pytest.mark.parametrize(("architecture", "fields", "answer"), BAD_FIELDS, ids=[a[:40] for _, _, a in BAD_FIELDS])
def test_bad_fields(tmp_path: Path, architecture: str, fields: dict[str, Any], answer: str) -> None:
    write(tmp_path, architecture, **fields)
    with pytest.raises(CheckpointError, match=re.escape(answer)) as caught:
        ModelConfig.from_folder(tmp_path)
    assert str(tmp_path / "config.json") in str(caught.value)


def test_fields_that_may_be_left_out(tmp_path: Path) -> None:
    write(tmp_path / "fast", FAST, head_dim=..., block_size=..., bd_size=8)
    config = ModelConfig.from_folder(tmp_path / "fast")
    assert (config.head_dim, config.block_length) == (16, 8)
    write(tmp_path / "llada", LLADA, partial_rotary_factor=..., rotary_dim=8, block_size=..., num_shared_experts=...)
    config = ModelConfig.from_folder(tmp_path / "llada")
    assert config.experts is not None
    assert (config.rotated, config.block_length, config.experts.shared_width) == (8, 32, 0)
    write(tmp_path / "moe", MOE, decoder_sparse_step=..., mlp_only_layers=..., norm_topk_prob=...)
    config = ModelConfig.from_folder(tmp_path / "moe", block_length=4)
    assert config.experts is not None
    assert (config.block_length, config.experts.dense_layers, config.experts.normalise) == (4, (), False)


def test_the_mask_of_a2d_is_the_tokenizers(tmp_path: Path) -> None:
    write(tmp_path, A2D, mask_token_id=...)
    assert ModelConfig.from_folder(tmp_path).mask_token_id == 259
    assert ModelConfig.from_folder(tmp_path, mask_token_id=7).mask_token_id == 7
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**settings, "mask_token": None}))
    with pytest.raises(CheckpointError, match=r"mask_token_id: found nothing, .*and neither does the tokenizer; give"):
        ModelConfig.from_folder(tmp_path)


def _without_an_expert(tensors: Tensors) -> None:
    del tensors["model.layers.1.mlp.experts.5.up_proj.weight"]


def _with_one_more(tensors: Tensors) -> None:
    tensors["model.layers.1.mlp.experts.8.up_proj.weight"] = torch.zeros(48, 64)


def _one_wider(tensors: Tensors) -> None:
    tensors["model.layers.1.mlp.experts.3.down_proj.weight"] = torch.zeros(64, 50)


def _one_of_integers(tensors: Tensors) -> None:
    tensors["model.layers.1.mlp.experts.3.gate_proj.weight"] = torch.zeros(48, 64, dtype=torch.int8)


def _without_bias(tensors: Tensors) -> None:
    del tensors["model.layers.1.mlp.gate.expert_bias"]


def _apart(tensors: Tensors) -> None:
    fused = tensors.pop("model.layers.0.attention.query_key_value.weight")
    tensors["model.layers.0.attention.q_proj.weight"] = fused[:128].clone()


def _without_a_query_bias(tensors: Tensors) -> None:
    del tensors["model.layers.0.self_attn.q_proj.bias"]


@pytest.mark.parametrize(
    ("architecture", "change", "answer"),
    [
        (MOE, _without_an_expert, "missing model.layers.1.mlp.experts.5.up_proj.weight [48, 64]"),
        (LLADA, _with_one_more, "unexpected model.layers.1.mlp.experts.8.up_proj.weight [48, 64]"),
        (LLADA, _one_wider, "model.layers.1.mlp.experts.3.down_proj.weight: expected [64, 48], found [64, 50]"),
        (MOE, _one_of_integers, "mlp.experts.3.gate_proj.weight: expected one of BF16, F16, F32, F64, found I8"),
        (LLADA, _without_bias, "missing model.layers.1.mlp.gate.expert_bias [8]"),
        (LLADA, _apart, "missing model.layers.0.attention.query_key_value.weight [256, 64]; unexpected model.layers.0"),
        (FAST, _without_a_query_bias, "missing model.layers.0.self_attn.q_proj.bias [128]"),
    ],
)
def test_tensors_that_do_not_fit(
    tmp_path: Path, architecture: str, change: Callable[[Tensors], None], answer: str
) -> None:
    write(tmp_path, architecture)
    tensors = load_file(tmp_path / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=re.escape(answer)):
        load_model(tmp_path, ModelConfig.from_folder(tmp_path), torch.float32, "cpu")


def test_a_mask_that_no_tokenizer_has_is_refused_before_any_weight_is_read(tmp_path: Path) -> None:
    write(tmp_path, A2D, mask_token_id=300)
    (tmp_path / "model.safetensors").write_bytes(b"not even weights")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: found 260 tokens, and none has the mask's id 300"):
        LLM(model=str(tmp_path), show_progress=False)


def test_experts_are_for_families_that_have_them(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="num_experts: found 4, allowed: one of"):
        write_random_checkpoint(tmp_path, num_experts=4)
    with pytest.raises(ConfigError, match="architecture: found 'SDARForCausalLM', allowed: LLaDA2MoeModelLM"):
        write_random_checkpoint(tmp_path, "llada2-mini", architecture="SDARForCausalLM")
    with pytest.raises(ConfigError, match="architecture: found 'DreamModel', allowed: SDARForCausalLM, "):
        write_random_checkpoint(tmp_path, architecture="DreamModel")
