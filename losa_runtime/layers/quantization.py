"""Weights of linear layers in eight bits with a scale per output channel, through torchao. Knows no model and no file.

Only the weights: activations, biases and sums stay in the model's dtype, and torchao's tensors compute the products
when they meet one in `F.linear`. int8: 255 even steps. fp8: e4m3, steps in proportion to the number. torchao is an
extra, imported when somebody asks for it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType

import torch
from torch import Tensor, nn

from losa_runtime.core.config import Quantization
from losa_runtime.core.errors import CheckpointError, ConfigError

DTYPES = (torch.float32, torch.bfloat16)
LEAST_INPUTS = 2  # torchao cannot shape the scales of a narrower weight
# Numbers quantized at once. With more of them on a CPU, glibc's heap keeps the memory of what they were made from: at
# 2**20 a process was larger than with the full weights.
AT_ONCE = {"cpu": 2**16, "device": 2**24}
LEAST_AMPLITUDE = 1e-30  # fp8: the scale of a channel of zeros would be 0, and its numbers 0 / 0
_NOISY = ("torchao", "torch.utils._pytree")  # warn of GPU libraries that nothing here uses

Quantizer = Callable[[str, Tensor], Tensor]


def make_quantizer(kind: Quantization, dtype: torch.dtype, device: torch.device) -> Quantizer:
    """(name, weight [N, C]) -> the same on `device` in eight bits, which `F.linear` takes for a weight of `dtype`.

    The weight goes to the device a few rows at a time, so there is never a wide copy of it. Raises ConfigError if
    torchao is missing or the dtype is none of DTYPES; the quantizer raises CheckpointError for weights that are not
    finite, which eight bits would turn into ordinary numbers, and ConfigError for those that are too narrow.
    """
    if dtype not in DTYPES:
        # A sum over int8 steps, not yet scaled, leaves float16's range.
        allowed = " or ".join(str(each).removeprefix("torch.") for each in DTYPES)
        raise ConfigError(
            f"quantization: found {kind!r} with dtype {str(dtype).removeprefix('torch.')}, allowed with dtype {allowed}"
        )
    ao = _torchao(kind)
    per_channel = ao.PerRow()

    def quantize(name: str, weight_NC: Tensor) -> Tensor:
        if weight_NC.shape[1] < LEAST_INPUTS:
            found = f"{kind!r} for {name} of {list(weight_NC.shape)}"
            raise ConfigError(f"quantization: found {found}, allowed: at least {LEAST_INPUTS} input channels")
        return _joined((quantize_rows(name, rows) for rows in weight_NC.split(_rows(weight_NC, device))), weight_NC)

    def quantize_rows(name: str, rows_NC: Tensor) -> Tensor:
        rows_NC = rows_NC.to(device, dtype)
        if not rows_NC.isfinite().all():
            raise CheckpointError(f"{name}: found infinite numbers or NaN, allowed with quantization {kind}: none")
        if kind == "int8":
            return ao.Int8Tensor.from_hp(rows_NC, granularity=per_channel)
        return ao.Float8Tensor.from_hp(rows_NC, granularity=per_channel, hp_value_lb=LEAST_AMPLITUDE)

    return quantize


def _rows(weight_NC: Tensor, device: torch.device) -> int:
    """How many rows are quantized at once."""
    return max(1, AT_ONCE["cpu" if device.type == "cpu" else "device"] // weight_NC.shape[1])


def _joined(parts: Iterator[Tensor], whole_NC: Tensor) -> Tensor:
    """One of torchao's tensors of the rows of several. Its own tensors have a row for each row that they stand for."""
    kept: dict[str, Tensor] = {}
    at = 0
    for part in parts:
        names, facts = part.__tensor_flatten__()  # type: ignore[attr-defined]
        for name in names:
            rows = getattr(part, name)
            if name not in kept:
                kept[name] = rows.new_empty(whole_NC.shape[0], *rows.shape[1:])
            kept[name][at : at + rows.shape[0]] = rows
        at += part.shape[0]
    return type(part).__tensor_unflatten__(kept, facts, whole_NC.shape, None)  # type: ignore[attr-defined]


def kept_bytes(module: nn.Module) -> int:
    """Bytes of a module's parameters as they are kept."""
    return sum(_bytes(parameter) for parameter in module.parameters())


def _bytes(tensor: Tensor) -> int:
    """torchao's tensors say nbytes of what they stand for; they are made of tensors that they name."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return tensor.nbytes
    return sum(getattr(tensor, name).nbytes for name in tensor.__tensor_flatten__()[0])


def _torchao(kind: Quantization) -> ModuleType:
    try:
        with _quiet():
            from torchao import quantization

            _ = quantization.Int8Tensor, quantization.Float8Tensor
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"quantization: found {kind!r}, which needs torchao 0.18 or newer ({error}): "
            "pip install 'losa-runtime[quantization]'"
        ) from None
    return quantization


@contextmanager
def _quiet() -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in _NOISY]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
