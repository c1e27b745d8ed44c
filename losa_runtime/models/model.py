"""What a model is to the rest of the runtime: an interface, the visible table of families, and how to load one.

A model turns tokens and positions into hidden states and logits. It knows nothing of masks, caches, requests or
sparsity: for attention it calls what it is handed.
Shape letters: T tokens, H query heads, G KV heads, D head dim, C hidden, R rows, V vocabulary.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from pathlib import Path
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from losa_runtime.core.config import Quantization
from losa_runtime.core.errors import CheckpointError, ConfigError
from losa_runtime.core.model_config import ModelConfig
from losa_runtime.layers.attention import AttendFn
from losa_runtime.layers.linear import Linear
from losa_runtime.layers.quantization import Quantizer, make_quantizer
from losa_runtime.models.weights import load_weights


class BlockDiffusionModel(nn.Module, ABC):
    """A model that predicts tokens from whole earlier blocks and their own block.

    shifted_logits: token i is predicted at position i - 1, else at position i. So the first token of a block comes from
    the last row of the block before it, once that is complete.
    tied: checkpoint tensor name -> name of the parameter that it repeats, for heads tied to the embedding.
    row_tile: rows per matrix product, see `losa_runtime.layers.linear`; None for as many as there are.
    """

    shifted_logits: ClassVar[bool] = False
    config: ModelConfig
    tied: dict[str, str]
    row_tile: int | None = None

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.tied = {}

    @abstractmethod
    def forward(self, tokens_T: Tensor, positions_T: Tensor, attend: AttendFn) -> Tensor:
        """Hidden states [T, C] after the final norm. tokens, positions: int64 [T]; positions below max_context."""

    @abstractmethod
    def logits(self, hidden_RC: Tensor) -> Tensor:
        """Scores float32 [R, V] of some rows of `forward`'s result; callers may go through the rows in chunks."""


# architecture in config.json -> module of this package and class in it, imported only when asked for
FAMILIES: dict[str, tuple[str, str]] = {
    "SDARForCausalLM": ("losa_runtime.models.sdar", "SDARForCausalLM"),
    "SDARMoeForCausalLM": ("losa_runtime.models.sdar_moe", "SDARMoeForCausalLM"),
    "LLaDA2MoeModelLM": ("losa_runtime.models.llada2", "LLaDA2MoeModelLM"),
    "Fast_dLLM_QwenForCausalLM": ("losa_runtime.models.fast_dllm", "FastDLLMForCausalLM"),
    "A2DQwen3LMHeadModel": ("losa_runtime.models.a2d", "A2DQwen3LMHeadModel"),
}


def family_class(architecture: str) -> type[BlockDiffusionModel]:
    """The class that implements an architecture. Raises CheckpointError with the known ones."""
    if architecture not in FAMILIES:
        raise CheckpointError(f"architecture: found {architecture!r}, allowed: {', '.join(sorted(FAMILIES))}")
    module, name = FAMILIES[architecture]
    return cast(type[BlockDiffusionModel], getattr(importlib.import_module(module), name))


def empty_model(config: ModelConfig) -> BlockDiffusionModel:
    """The model with its parameters on the meta device: shapes only, no memory."""
    with torch.device("meta"):
        return family_class(config.architecture)(config)


def load_model(
    folder: str | Path,
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device | str,
    show_progress: bool = False,
    quantization: Quantization | None = None,
) -> BlockDiffusionModel:
    """Load a checkpoint folder in `dtype` onto `device`, in eval mode and without gradients.

    Peak memory is the model plus one tensor. quantization: keeps the linear layers, lm_head aside, in 8 bits, made as
    they are read; the peak is the model as it is kept plus the largest tensor that is not quantized. Raises
    CheckpointError listing every tensor that does not fit, ConfigError if the quantization cannot be had.
    """
    model = empty_model(config)
    target = torch.device(device)
    remake = {} if quantization is None else _quantizers(model, quantization, dtype, target)
    load_weights(
        Path(folder), model, model.tied, dtype=dtype, device=target, show_progress=show_progress, remake=remake
    )
    return model.to(target).eval().requires_grad_(False)


def _quantizers(
    model: BlockDiffusionModel, quantization: Quantization, dtype: torch.dtype, device: torch.device
) -> dict[str, Quantizer]:
    """Parameter -> what quantizes it. Embeddings, norms and lm_head, which tells tokens apart, keep their dtype."""
    if model.config.experts is not None:
        raise ConfigError(
            f"quantization: found {quantization!r} for {model.config.architecture}, allowed for models with experts: "
            "none, since most of their weights go to grouped kernels that read no 8-bit weights"
        )
    quantize = make_quantizer(quantization, dtype, device)
    layers = {name: part for name, part in model.named_modules() if isinstance(part, Linear) and name != "lm_head"}
    for layer in layers.values():
        layer.widen_once = quantization == "fp8"  # takes longer than a tile's product; int8 does not
    return {f"{name}.weight": quantize for name in layers}
