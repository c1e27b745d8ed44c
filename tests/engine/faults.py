"""Faults on demand: a model that raises, or whose numbers go bad, when it meets a token. For tests only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from losa_runtime.engine import Engine

Fault = Callable[[Tensor, int], bool]  # (tokens of the forward, layer) -> whether it strikes there


class FaultyModel:
    """Stands before a model: raises inside attention, when earlier layers have already left their traces."""

    def __init__(self, model: Any, strikes: Fault) -> None:
        self.model, self.strikes = model, strikes
        self.struck = 0

    def __call__(self, tokens_T: Tensor, positions_T: Tensor, attend: Any) -> Tensor:
        def faulty(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if self.strikes(tokens_T, layer):
                self.struck += 1
                raise RuntimeError("a fault in the model")
            out: Tensor = attend(layer, q, k, v)
            return out

        hidden: Tensor = self.model(tokens_T, positions_T, faulty)
        return hidden

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)


def raises_on(token: int, at_least: int = 1, layer: int = 1) -> Fault:
    """Strikes in `layer` of forwards in which `token` occurs at least so often in a row of blocks."""
    return lambda tokens_T, at: at == layer and int((tokens_T == token).sum()) >= at_least


def install(engine: Engine, strikes: Fault) -> FaultyModel:
    """Put a faulty model into an engine."""
    faulty = FaultyModel(engine.parts.runner.model, strikes)
    engine.parts.runner.model = faulty  # type: ignore[assignment]
    return faulty


def break_embedding(engine: Engine, token: int, value: float = float("nan")) -> Tensor:
    """Make a token's embedding no number; returns what it was."""
    names = dict(engine.parts.runner.model.named_parameters())
    [embedding] = [tensor for name, tensor in names.items() if "embed" in name]
    before = embedding[token].detach().clone()
    with torch.no_grad():
        embedding[token] = value
    return before
