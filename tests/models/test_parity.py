"""The model computes what transformers' Qwen3 computes under a block-causal mask, for every shape that it accepts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from losa_runtime.core.config import RopeScaling
from losa_runtime.core.model_config import ModelConfig
from losa_runtime.layers.norm import RMSNorm
from losa_runtime.layers.rope import RotaryEmbedding, rotate
from losa_runtime.models.model import load_model
from losa_runtime.models.random_checkpoint import write_random_checkpoint
from losa_runtime.tokenizer import Tokenizer
from tests.models.oracle import dense_attend, transformers_logits

LENGTH = 52
BUNDLED = Path(__file__).parents[2] / "benchmarks" / "tiny_model" / "checkpoint"


def our_logits(folder: Path, tokens: Tensor, **options: Any) -> Tensor:
    config = ModelConfig.from_folder(folder, **options)
    model = load_model(folder, config, torch.float32, "cpu")
    hidden_TC = model(tokens, torch.arange(tokens.shape[0]), dense_attend(config.block_length))
    return model.logits(hidden_TC)


def largest_difference(folder: Path, rope: dict[str, Any] | None = None, **options: Any) -> float:
    tokens = torch.randint(0, 320, (LENGTH,), generator=torch.Generator().manual_seed(1))
    block = ModelConfig.from_folder(folder, **options).block_length
    ours, theirs = our_logits(folder, tokens, **options), transformers_logits(folder, tokens, block, rope)
    assert theirs.abs().max() > 1
    assert ours.dtype == torch.float32
    return float((ours - theirs).abs().max())


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize("block", [4, 16])
def test_parity(tmp_path: Path, tied: bool, heads: int, kv_heads: int, block: int) -> None:
    config = write_random_checkpoint(
        tmp_path,
        tie_word_embeddings=tied,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        block_size=block,
        num_hidden_layers=3,
        seed=heads + kv_heads,
    )
    assert config.head_dim * config.num_heads != config.hidden_size
    assert largest_difference(tmp_path) < 1e-4


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
SCALINGS = [
    {"rope_type": "linear", "factor": 2.5},
    YARN,
    {**YARN, "beta_fast": 20.0, "beta_slow": 2.0},
    {**YARN, "attention_factor": 1.3},
]


@pytest.mark.parametrize("scaling", SCALINGS)
def test_parity_with_rope_scaling_in_the_file(tmp_path: Path, scaling: dict[str, Any]) -> None:
    write_random_checkpoint(tmp_path, max_position_embeddings=256, rope_scaling=scaling)
    assert largest_difference(tmp_path, scaling) < 1e-4


def test_parity_with_rope_scaling_as_an_option(tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path, max_position_embeddings=64)
    option = RopeScaling(kind="yarn", factor=4.0)
    assert largest_difference(tmp_path, YARN, rope_scaling=option) < 1e-4
    plain = our_logits(tmp_path, torch.arange(LENGTH))
    assert not torch.allclose(plain, our_logits(tmp_path, torch.arange(LENGTH), rope_scaling=option), atol=1e-2)


@pytest.mark.parametrize("scaling", [None, *SCALINGS])
@pytest.mark.parametrize(("head_dim", "theta"), [(32, 1e4), (128, 1e6), (64, 1e7)])
def test_rope_tables_equal_those_of_transformers(scaling: dict[str, Any] | None, head_dim: int, theta: float) -> None:
    from transformers import Qwen3Config
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding, apply_rotary_pos_emb

    parameters = {"rope_type": "default", **(scaling or {}), "rope_theta": theta}
    if parameters["rope_type"] == "yarn":
        parameters["original_max_position_embeddings"] = 4096
    config = Qwen3Config(head_dim=head_dim, max_position_embeddings=4096 * 4, rope_parameters=parameters)
    positions = torch.tensor([0, 1, 17, 4095, 9999])
    x_TND = torch.randn(5, 3, head_dim, generator=torch.Generator().manual_seed(0))
    theirs, _ = apply_rotary_pos_emb(
        x_TND.transpose(0, 1)[None], x_TND.transpose(0, 1)[None], *Qwen3RotaryEmbedding(config)(x_TND, positions[None])
    )
    fields = {k: v for k, v in parameters.items() if k not in ("rope_type", "rope_theta")}
    ours = RopeScaling(kind=parameters["rope_type"], **fields) if scaling else None
    rope = RotaryEmbedding(head_dim, theta, ours, 4096, 4096 * 4)
    torch.testing.assert_close(rotate(x_TND, *rope(positions)), theirs[0].transpose(0, 1), atol=1e-5, rtol=1e-5)


def test_later_blocks_do_not_change_earlier_ones(tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path, block_size=16)
    tokens = torch.arange(64)
    whole, cut = our_logits(tmp_path, tokens), our_logits(tmp_path, tokens[:32])
    torch.testing.assert_close(whole[:32], cut, atol=1e-4, rtol=1e-4)


def test_model_runs_on_a_few_rows_at_any_positions(tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path)
    config = ModelConfig.from_folder(tmp_path)
    model = load_model(tmp_path, config, torch.bfloat16, "cpu")
    seen: list[tuple[int, ...]] = []

    def attend(layer: int, q_THD: Tensor, k_TGD: Tensor, v_TGD: Tensor) -> Tensor:
        assert q_THD.dtype == k_TGD.dtype == v_TGD.dtype == torch.bfloat16
        seen.append((layer, *q_THD.shape, *k_TGD.shape, *v_TGD.shape))
        return torch.zeros_like(q_THD)

    hidden_TC = model(torch.tensor([3, 3, 3]), torch.tensor([config.max_context - 1, 0, 7]), attend)
    assert seen == [(i, 3, 4, 32, 3, 2, 32, 3, 2, 32) for i in range(config.num_layers)]
    assert hidden_TC.dtype == torch.bfloat16
    assert model.logits(hidden_TC[:1]).shape == (1, 320)
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())


def test_norm_is_computed_in_float32() -> None:
    norm = RMSNorm(64, 1e-6).to(torch.bfloat16)
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0)).mul(300).to(torch.bfloat16)
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt()
    assert torch.equal(norm(x), exact.float().to(torch.bfloat16))


def test_parity_on_the_bundled_checkpoint() -> None:
    tokenizer = Tokenizer(BUNDLED)
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "The secret code of the fox is 1234. " * 4}])
    ids = torch.tensor(tokenizer.encode(prompt))
    block = ModelConfig.from_folder(BUNDLED).block_length
    assert (our_logits(BUNDLED, ids) - transformers_logits(BUNDLED, ids, block)).abs().max() < 1e-4
