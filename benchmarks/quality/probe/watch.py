"""Looks on while blocks attend: a backend that passes everything on and tells what went through, layer by layer.

S segments of a group, B block length, H query heads, G KV heads, D head dim, R = S * B rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

from torch import Tensor

from losa_runtime.attention.backend import AttentionBackend
from losa_runtime.attention.questions import AttnState, PrefixPlan, PrefixState, RenewedStates, RowGroup


class Seen(NamedTuple):
    """The block rows of a group in one layer. prefix: what the method made of the prefix, for all rows."""

    layer: int
    group: RowGroup
    q_RHD: Tensor
    k_RGD: Tensor
    v_RGD: Tensor
    prefix: AttnState
    backend: AttentionBackend

    def exact(self) -> AttnState:
        """Attention of the same rows to the whole prefix."""
        return self.backend.settle(self.backend.prefix(self.layer, self.q_RHD, PrefixPlan(), self.group))

    def merged(self, prefix: AttnState) -> Tensor:
        """Attention to the prefix and the block: [R, H, D]."""
        return self.backend.block_merged(prefix, self.q_RHD, self.k_RGD, self.v_RGD, self.group)


def watching(see: Callable[[Seen], None]) -> Callable[[AttentionBackend], AttentionBackend]:
    """What to put in front of a backend: calls `see` once per group and layer, when the method has completed it."""
    return lambda backend: cast(AttentionBackend, _Watched(backend, see))


class _Watched:
    """Everything else is the backend's."""

    def __init__(self, backend: AttentionBackend, see: Callable[[Seen], None]) -> None:
        self._backend, self._seen, self._layer = backend, see, -1

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def prefix(self, layer: int, q_RHD: Tensor, plan: PrefixPlan, group: RowGroup) -> PrefixState:
        self._layer = layer
        return self._backend.prefix(layer, q_RHD, plan, group)

    def block_merged(
        self, prefix: PrefixState | RenewedStates, q_RHD: Tensor, k_RGD: Tensor, v_RGD: Tensor, group: RowGroup
    ) -> Tensor:
        settled = self._backend.settle(prefix)
        self._seen(Seen(self._layer, group, q_RHD, k_RGD, v_RGD, settled, self._backend))
        return self._backend.block_merged(settled, q_RHD, k_RGD, v_RGD, group)
