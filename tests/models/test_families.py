"""Every family computes what an independent implementation computes, from folders with its own names and fields."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from losa_runtime.core.architectures import SUPPORTED
from losa_runtime.core.model_config import ModelConfig
from losa_runtime.layers.linear import ROW_TILE, use_row_tile
from losa_runtime.models.model import load_model
from losa_runtime.models.random_checkpoint import write_random_checkpoint
from tests.models.llada2_oracle import llada2_logits
from tests.models.oracle import THEIRS, dense_attend, transformers_logits

LENGTH = 37
TOKENS = torch.randint(0, 320, (LENGTH,), generator=torch.Generator().manual_seed(1))


def our_logits(folder: Path, dtype: torch.dtype = torch.float32, tile: int | None = None) -> Tensor:
    config = ModelConfig.from_folder(folder)
    model = load_model(folder, config, dtype, "cpu")
    use_row_tile(model, tile)
    return model.logits(model(TOKENS, torch.arange(LENGTH), dense_attend(config.block_length)))


def their_logits(folder: Path, architecture: str) -> Tensor:
    block = ModelConfig.from_folder(folder).block_length
    if architecture in THEIRS:
        return transformers_logits(folder, TOKENS, block)
    return llada2_logits(folder, TOKENS, block).float()


VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("SDARMoeForCausalLM", {}),
    ("SDARMoeForCausalLM", {"norm_topk_prob": False, "num_experts_per_tok": 3, "tie_word_embeddings": True}),
    ("SDARMoeForCausalLM", {"num_hidden_layers": 4, "decoder_sparse_step": 2, "mlp_only_layers": [3]}),
    ("LLaDA2MoeModelLM", {"num_hidden_layers": 3}),
    ("LLaDA2MoeModelLM", {"n_group": 1, "topk_group": 1, "num_shared_experts": 2, "norm_topk_prob": False}),
    ("LLaDA2MoeModelLM", {"partial_rotary_factor": 1.0, "first_k_dense_replace": 0, "num_shared_experts": 0}),
    ("LLaDA2MoeModelLM", {"partial_rotary_factor": 0.25, "tie_word_embeddings": True, "num_experts_per_tok": 4}),
    ("Fast_dLLM_QwenForCausalLM", {"head_dim": 16}),
    ("Fast_dLLM_QwenForCausalLM", {"head_dim": 16, "num_key_value_heads": 1, "tie_word_embeddings": True}),
    ("A2DQwen3LMHeadModel", {}),
]


@pytest.mark.parametrize(("architecture", "fields"), VARIANTS, ids=str)
def test_logits_equal_an_independent_implementation(tmp_path: Path, architecture: str, fields: dict[str, Any]) -> None:
    write_random_checkpoint(tmp_path, architecture=architecture, seed=3, **fields)
    want = their_logits(tmp_path, architecture)
    assert want.abs().max() > 1
    assert (our_logits(tmp_path) - want).abs().max() < 1e-4
    assert (our_logits(tmp_path, tile=ROW_TILE) - want).abs().max() < 1e-4


def test_every_family_is_compared() -> None:
    assert {architecture for architecture, _ in VARIANTS} | {"SDARForCausalLM"} == set(SUPPORTED)


@pytest.mark.parametrize("architecture", ["SDARMoeForCausalLM", "LLaDA2MoeModelLM"])
def test_bfloat16_experts_come_close(tmp_path: Path, architecture: str) -> None:
    """Most positions: a rounding may send a token to another expert."""
    write_random_checkpoint(tmp_path, architecture=architecture, seed=4)
    far = (our_logits(tmp_path, torch.bfloat16) - their_logits(tmp_path, architecture)).abs().amax(-1)
    assert far.quantile(0.7) < 0.15


def test_the_bias_of_experts_keeps_its_bits(tmp_path: Path) -> None:
    config = write_random_checkpoint(tmp_path, architecture="LLaDA2MoeModelLM")
    model = load_model(tmp_path, config, torch.bfloat16, "cpu")
    wanted = load_file(tmp_path / "model.safetensors")["model.layers.1.mlp.gate.expert_bias"]
    assert torch.equal(model.get_parameter("model.layers.1.mlp.gate.expert_bias"), wanted)


def test_tensors_have_the_names_of_the_released_checkpoints(tmp_path: Path) -> None:
    names = {
        "SDARMoeForCausalLM": ("model.layers.1.mlp.gate.weight", "model.layers.1.mlp.experts.7.down_proj.weight"),
        "LLaDA2MoeModelLM": (
            *("model.word_embeddings.weight", "model.layers.0.attention.query_key_value.weight"),
            *("model.layers.0.attention.key_layernorm.weight", "model.layers.0.attention.dense.weight"),
            *("model.layers.0.mlp.gate_proj.weight", "model.layers.1.mlp.gate.expert_bias"),
            *("model.layers.1.mlp.experts.0.up_proj.weight", "model.layers.1.mlp.shared_experts.down_proj.weight"),
        ),
    }
    for architecture, expected in names.items():
        write_random_checkpoint(tmp_path, architecture=architecture, overwrite=True)
        assert set(expected) <= set(load_file(tmp_path / "model.safetensors"))
