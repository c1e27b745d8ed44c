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
LEAST_AMPLITUDE = 1e-30  # fp8: the scale of a channel of zeros would be 0, and its numbers 0 / 0
_NOISY = ("torchao", "torch.utils._pytree")  # warn of GPU libraries that nothing here uses

Quantizer = Callable[[str, Tensor], Tensor]


def make_quantizer(kind: Quantization, dtype: torch.dtype) -> Quantizer:
    """(name, weight [N, C] in `dtype`) -> the same in eight bits, which `F.linear` takes for a weight of `dtype`.

    Raises ConfigError if torchao is missing or the dtype is none of DTYPES; the quantizer raises CheckpointError for
    weights that are not finite, which eight bits would turn into ordinary numbers.
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
        if not weight_NC.isfinite().all():
            raise CheckpointError(f"{name}: found infinite numbers or NaN, allowed with quantization {kind}: none")
        if kind == "int8":
            return ao.Int8Tensor.from_hp(weight_NC, granularity=per_channel)
        return ao.Float8Tensor.from_hp(weight_NC, granularity=per_channel, hp_value_lb=LEAST_AMPLITUDE)

    return quantize


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
