"""Linear layers in eight bits against plain arithmetic: what is kept, what it computes, and what is refused."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchao
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from losa_runtime.core.config import EngineConfig, Quantization
from losa_runtime.core.errors import CheckpointError, ConfigError
from losa_runtime.core.model_config import ModelConfig
from losa_runtime.layers.linear import ROW_TILE, Linear, use_row_tile
from losa_runtime.layers.quantization import AT_ONCE, kept_bytes, make_quantizer
from losa_runtime.models.model import BlockDiffusionModel, load_model
from losa_runtime.models.random_checkpoint import write_random_checkpoint
from tests.models.oracle import dense_attend

KINDS: tuple[Quantization, ...] = ("int8", "fp8")
DENSE = ("SDARForCausalLM", "Fast_dLLM_QwenForCausalLM", "A2DQwen3LMHeadModel")
CPU = torch.device("cpu")
TOKENS = torch.randint(0, 320, (37,), generator=torch.Generator().manual_seed(1))


def rounded(weight_NC: Tensor, kind: Quantization) -> Tensor:
    """What eight bits leave of a weight, float64: symmetric, the scale maps a channel's largest number to the range's
    end. In the precision that decides between neighbours: float32, but fp8's scale has the weight's own dtype."""
    weight, most = weight_NC.float(), weight_NC.abs().amax(1, keepdim=True)
    if kind == "int8":
        step = most.float() / 127.5
        return (weight * (1 / step)).round().clamp(-128, 127).double() * step.double()
    step = (most / 448).float()
    return (weight / step).clamp(-448, 448).to(torch.float8_e4m3fn).double() * step.double()


def most_lost(weight_NC: Tensor, kind: Quantization) -> Tensor:
    """Bound of the loss of each number: half a step."""
    weight = weight_NC.double().abs()
    most = weight.amax(1, keepdim=True)
    if kind == "int8":
        return (most / 255).clamp(min=1e-7).expand_as(weight)
    return torch.maximum(weight * 2**-4, most / 448 * 2**-10).clamp(min=1e-33)


def layer_of(weight_NC: Tensor, kind: Quantization, tile: int | None = None, bias_N: Tensor | None = None) -> Linear:
    layer = Linear(*weight_NC.shape[::-1], bias=bias_N is not None)
    layer.weight = nn.Parameter(make_quantizer(kind, weight_NC.dtype, CPU)("w", weight_NC), requires_grad=False)
    if bias_N is not None:
        layer.bias = nn.Parameter(bias_N, requires_grad=False)
    layer.widen_once = kind == "fp8"
    use_row_tile(layer, tile)
    return layer


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def loaded(folder: Path, kind: Quantization | None, dtype: torch.dtype = torch.float32) -> BlockDiffusionModel:
    return load_model(folder, ModelConfig.from_folder(folder), dtype, "cpu", quantization=kind)


def logits_of(model: BlockDiffusionModel) -> Tensor:
    positions = torch.arange(len(TOKENS))
    return model.logits(model(TOKENS, positions, dense_attend(model.config.block_length)))


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None)
@given(
    shape=st.tuples(st.integers(1, 9), st.integers(2, 70)),
    seed=st.integers(0, 2**20),
    exponents=st.lists(st.integers(-12, 12), min_size=9, max_size=9),
    nothing=st.integers(0, 8),
)
def test_no_number_loses_more_than_half_a_step(
    kind: Quantization, shape: tuple[int, int], seed: int, exponents: list[int], nothing: int
) -> None:
    """Channels of very different size do not disturb each other, and a channel of zeros stays one."""
    weight = randn(*shape, seed=seed) * torch.tensor(exponents[: shape[0]]).double().exp2().float()[:, None]
    weight[nothing:] = 0
    kept = F.linear(torch.eye(shape[1]), layer_of(weight, kind).weight).T
    lost = (kept.double() - weight.double()).abs()
    assert (lost <= most_lost(weight, kind) * (1 + 1e-4)).all()


@pytest.mark.parametrize("tile", [None, ROW_TILE])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1.5e-2)])
@pytest.mark.parametrize("kind", KINDS)
def test_products_are_those_of_the_rounded_weights(
    kind: Quantization, dtype: torch.dtype, tolerance: float, tile: int | None
) -> None:
    """Tolerance relative to the largest result; bfloat16 has 8 bits for weights or scales, and results."""
    weight, bias, x = randn(48, 80).to(dtype), randn(48, seed=1).to(dtype), randn(67, 80, seed=2).to(dtype)
    found = layer_of(weight, kind, tile, bias)(x)
    wanted = x.double() @ rounded(weight, kind).T + bias.double()
    assert found.dtype == dtype and found.shape == (67, 48)
    assert (found.double() - wanted).abs().max() < tolerance * wanted.abs().max()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_in_tiles_has_the_same_bits_in_any_company(kind: Quantization, dtype: torch.dtype) -> None:
    layer = layer_of(randn(96, 64).to(dtype), kind, ROW_TILE)
    x = randn(150, 64, seed=1).to(dtype)
    together = layer(x)
    for rows in (slice(0, 1), slice(31, 33), slice(70, 150)):
        assert torch.equal(layer(x[rows]), together[rows])


@pytest.mark.parametrize("tile", [None, ROW_TILE])
@pytest.mark.parametrize("kind", KINDS)
def test_a_product_asks_nothing_of_its_numbers(kind: Quantization, tile: int | None) -> None:
    """It runs where tensors have none, so on a device the host waits for nothing and a step can be recorded."""
    layer = layer_of(randn(48, 80).bfloat16(), kind, tile).to("meta")
    found = layer(torch.empty(70, 80, dtype=torch.bfloat16, device="meta"))
    assert (found.device.type, found.dtype, tuple(found.shape)) == ("meta", torch.bfloat16, (70, 48))


@pytest.mark.parametrize("architecture", DENSE)
@pytest.mark.parametrize(("kind", "far"), [("int8", 0.15), ("fp8", 0.6)])
def test_logits_of_families(tmp_path: Path, architecture: str, kind: Quantization, far: float) -> None:
    """Equal to those of a plain model with rounded weights, and not far from the model's own."""
    fields: dict[str, Any] = {"head_dim": 16} if architecture.startswith("Fast") else {}
    write_random_checkpoint(tmp_path, architecture=architecture, seed=3, **fields)
    plain = loaded(tmp_path, None)
    own = logits_of(plain)
    for name, part in plain.named_modules():
        if isinstance(part, Linear) and name != "lm_head":
            part.weight.data = rounded(part.weight, kind).float()
    found = logits_of(loaded(tmp_path, kind))
    assert (found - logits_of(plain)).abs().max() < 1e-3
    assert 1e-3 < (found - own).abs().max() < far


@pytest.mark.parametrize(("kind", "beside"), [("int8", 4 + 1), ("fp8", 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
def test_linear_layers_take_a_byte_per_weight(
    tmp_path: Path, kind: Quantization, beside: int, dtype: torch.dtype, tied: bool
) -> None:
    """Beside it, per channel: a float32 scale, and of int8 a zero. Embedding, head and norms stay as they are."""
    write_random_checkpoint(tmp_path, architecture="A2DQwen3LMHeadModel", tie_word_embeddings=tied)
    plain = loaded(tmp_path, None, dtype)
    wanted = 0
    for name, part in plain.named_parameters():
        linear = part.dim() == 2 and "_proj" in name
        wanted += part.numel() + beside * part.shape[0] if linear else part.nbytes
    assert kept_bytes(plain) == sum(part.nbytes for part in plain.parameters())
    assert kept_bytes(loaded(tmp_path, kind, dtype)) == wanted < kept_bytes(plain)


class Widest(TorchDispatchMode):
    """The most numbers of more than a byte in any tensor that is made while it is on."""

    most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for made in out if isinstance(out, tuple | list) else [out]:
            if type(made) is Tensor and made.itemsize > 1:
                self.most = max(self.most, made.numel())
        return out


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [1, 7, 16])
def test_only_a_few_rows_are_there_in_full(kind: Quantization, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """And cutting a weight changes none of its numbers."""
    weight = randn(45, 64)
    quantize = make_quantizer(kind, torch.bfloat16, CPU)
    whole = quantize("w", weight)
    monkeypatch.setitem(AT_ONCE, "cpu", 64 * rows + 63)
    with Widest() as seen:
        cut = quantize("w", weight)
    assert 0 < seen.most <= 64 * rows < weight.numel()
    names = cut.__tensor_flatten__()[0]  # type: ignore[attr-defined]
    assert {"qdata", "scale"} <= set(names) and cut.shape == weight.shape and cut.dtype == torch.bfloat16
    assert all(torch.equal(getattr(cut, name), getattr(whole, name)) for name in names)


@pytest.mark.parametrize("kind", KINDS)
def test_too_narrow_weights_are_refused(kind: Quantization) -> None:
    quantize = make_quantizer(kind, torch.float32, CPU)
    with pytest.raises(ConfigError, match=rf"found '{kind}' for a.b of \[4, 1\], allowed: at least 2 input channels"):
        quantize("a.b", torch.ones(4, 1))
    assert quantize("a.b", torch.ones(1, 2)).shape == (1, 2)


def test_unknown_kinds_are_refused() -> None:
    with pytest.raises(ConfigError, match="quantization: found 'int4': Input should be 'int8' or 'fp8'"):
        EngineConfig.parse(model="m", quantization="int4")


@pytest.mark.parametrize("kind", KINDS)
def test_float16_is_refused(tmp_path: Path, kind: Quantization) -> None:
    write_random_checkpoint(tmp_path)
    words = f"quantization: found '{kind}' with dtype float16, allowed with dtype float32 or bfloat16"
    with pytest.raises(ConfigError, match=words):
        loaded(tmp_path, kind, torch.float16)


@pytest.mark.parametrize("architecture", ["SDARMoeForCausalLM", "LLaDA2MoeModelLM"])
def test_experts_are_refused(tmp_path: Path, architecture: str) -> None:
    write_random_checkpoint(tmp_path, architecture=architecture)
    with pytest.raises(ConfigError, match=f"quantization: found 'int8' for {architecture}, allowed .*: none, since"):
        loaded(tmp_path, "int8")


@pytest.mark.parametrize("old", [False, True])
def test_a_missing_or_old_torchao_is_named(tmp_path: Path, old: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    write_random_checkpoint(tmp_path)
    if old:
        monkeypatch.delattr(torchao.quantization, "Int8Tensor")
    else:
        monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(ConfigError, match=r"needs torchao 0\.18 or newer .*pip install 'losa-runtime\[quantization\]'"):
        loaded(tmp_path, "fp8")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(tmp_path: Path, kind: Quantization, bad: float) -> None:
    write_random_checkpoint(tmp_path)
    name = "model.layers.1.mlp.up_proj.weight"
    tensors = load_file(tmp_path / "model.safetensors")
    tensors[name][3, 5] = bad
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"{name}: found infinite numbers or NaN, allowed .*{kind}: none"):
        loaded(tmp_path, kind)
