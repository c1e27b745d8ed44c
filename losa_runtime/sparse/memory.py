"""What methods remember between the steps of a block: prefix attention and queries per row, lists per slot.

State is indexed by layer and slot, begins with a block's first step and ends with `close`. A slot belongs to one
request, hence to one method at a time, so all methods share one `BlockMemory`. Knows no rule of any method.
X slots, B block length, H query heads, D head dim, E lists per slot.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from losa_runtime.attention.questions import AttnState, KVIndices, PrefixState, RenewedStates, Rows
from losa_runtime.sparse.step import DenoiseStep


class Geometry(NamedTuple):
    """The fixed sizes a method works with. max_slots: requests that may hold method state at once.

    context_length: most tokens of a request.
    """

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    block_length: int
    page_size: int
    max_slots: int
    context_length: int
    device: torch.device


class RowStates:
    """A prefix attention state per layer, slot and row: out [layers, X * B, H, D], lse without D, both float32.

    Allocated on first use.
    """

    def __init__(self, geometry: Geometry) -> None:
        self._geometry = geometry
        self._tensors: tuple[Tensor, Tensor] | None = None

    def of_layer(self, layer: int) -> AttnState:
        """The layer's states, out [X * B, H, D] and lse [X * B, H], views to be written to. What lies at a place (see
        DenoiseStep.place_R) means nothing before it is written."""
        if self._tensors is None:
            shape = state_shape(self._geometry)
            device = self._geometry.device
            self._tensors = (torch.zeros(shape, device=device), torch.zeros(shape[:-1], device=device))
        out, lse = self._tensors
        return AttnState(out[layer], lse[layer])

    def write(self, layer: int, place: Tensor, state: AttnState) -> None:
        """Remember the states of the rows at `place`."""
        for kept, fresh in zip(self.of_layer(layer), state, strict=True):
            kept.index_copy_(0, place, fresh)

    def read(self, layer: int, place: Tensor) -> AttnState:
        """The states of the rows at `place`."""
        return AttnState(*(kept.index_select(0, place) for kept in self.of_layer(layer)))

    @staticmethod
    def bytes(geometry: Geometry) -> int:
        """Memory when allocated."""
        layers, rows, heads, dim = state_shape(geometry)
        return layers * rows * heads * (dim + 1) * 4


class RowQueries:
    """A query per layer, slot and row, in the model's dtype. Allocated on first use."""

    def __init__(self, geometry: Geometry) -> None:
        self._geometry = geometry
        self._query: Tensor | None = None

    def of_layer(self, layer: int, like: Tensor) -> Tensor:
        """The layer's queries [X, B, H, D], a view to be written to, in the dtype of `like`."""
        g = self._geometry
        if self._query is None:
            self._query = torch.zeros(state_shape(g), dtype=like.dtype, device=like.device)
        return self._query[layer].view(g.max_slots, g.block_length, g.num_heads, g.head_dim)

    @staticmethod
    def bytes(geometry: Geometry, itemsize: int) -> int:
        """Memory when allocated; itemsize: bytes of a query's number."""
        layers, rows, heads, dim = state_shape(geometry)
        return layers * rows * heads * dim * itemsize


class BlockMemory:
    """Per layer, slot and row of the current block: prefix attention and a query."""

    def __init__(self, geometry: Geometry) -> None:
        self.geometry = geometry
        self.prefix, self._queries = RowStates(geometry), RowQueries(geometry)
        self._open: set[tuple[int, int]] = set()

    def query(self, layer: int, like: Tensor) -> Tensor:
        """Remembered queries of a layer, see RowQueries."""
        return self._queries.of_layer(layer, like)

    def begin(self, layer: int, step: DenoiseStep) -> None:
        """Note which slots have opened their block, and insist that the others did before."""
        self._open.update((layer, slot) for slot, first in zip(step.slots, step.opens, strict=True) if first)
        unknown = [slot for slot in step.used_slots if (layer, slot) not in self._open]
        assert not unknown, f"slots {unknown} are read in layer {layer} without an opening step"

    def renew(
        self, layer: int, rows: Rows | None, got: PrefixState, step: DenoiseStep, heads_nH: Tensor | None = None
    ) -> RenewedStates:
        """The states of all rows of the step's group, where `got` replaces those of `rows` (None: all) when the backend
        settles them. heads_nH: see RenewedStates."""
        return RenewedStates(self.prefix.of_layer(layer), step.place_R, rows, got, heads_nH)

    def close(self, slot: int) -> None:
        """Forget a slot: reading it again needs an opening step first."""
        self._open -= {(layer, slot) for layer in range(self.geometry.num_layers)}

    @staticmethod
    def bytes(geometry: Geometry, itemsize: int) -> int:
        """Memory when allocated; itemsize: bytes of a query's number."""
        return RowStates.bytes(geometry) + RowQueries.bytes(geometry, itemsize)


class _Held(NamedTuple):
    """Lists of a layer and slot: sizes int64 [E], indices one after another, and the size of the longest."""

    sizes: Tensor
    indices: Tensor
    most: int


class HeldLists:
    """Granules that a block keeps reading, E lists (one per KV head or query head) per layer and slot.

    Takes 8 bytes per granule and list: at most 1/32 of the listed K/V themselves for head dim 64 in 16 bits.
    """

    def __init__(self) -> None:
        self._lists: dict[tuple[int, int], _Held] = {}

    def put(self, layer: int, slot: int, chosen_EN: Tensor, granules_EN: Tensor | None = None) -> None:
        """Hold the granules marked in a bool mask; granules_EN: their numbers, ascending (None: 0 .. N - 1)."""
        indices = chosen_EN.nonzero()[:, -1] if granules_EN is None else granules_EN[chosen_EN]
        sizes = chosen_EN.sum(-1)
        self._lists[layer, slot] = _Held(sizes, indices, int(sizes.max()))

    def extend(self, layer: int, slot: int, more_EN: Tensor) -> None:
        """Hold the granules marked in a bool mask, too."""
        sizes, indices, _ = self._get(layer, slot)
        head = torch.repeat_interleave(torch.arange(sizes.shape[0], device=indices.device), sizes)
        held_EN = more_EN.clone()
        held_EN[head, indices] = True
        self.put(layer, slot, held_EN)

    def lists(self, layer: int, slots: Sequence[int], whole: tuple[bool, ...]) -> KVIndices:
        """The lists of these slots; empty for those in `whole`, which read everything."""
        held = [None if all_ else self._get(layer, slot) for slot, all_ in zip(slots, whole, strict=True)]
        like = next(entry for entry in held if entry is not None)
        nothing = _Held(torch.zeros_like(like.sizes), like.indices[:0], 0)
        found = [nothing if entry is None else entry for entry in held]
        ends = torch.cat([entry.sizes for entry in found]).cumsum(0)
        indptr = torch.cat((ends.new_zeros(1), ends))
        indices, most = torch.cat([entry.indices for entry in found]), max(entry.most for entry in found)
        return KVIndices(indptr, indices, like.sizes.shape[0], whole, most=most)

    def close(self, slot: int) -> None:
        """Forget a slot."""
        for key in [key for key in self._lists if key[1] == slot]:
            del self._lists[key]

    def _get(self, layer: int, slot: int) -> _Held:
        found = self._lists.get((layer, slot))
        assert found is not None, f"slots [{slot}] are read in layer {layer} without an opening step"
        return found


def state_shape(geometry: Geometry) -> tuple[int, int, int, int]:
    """[layers, X * B, H, D] of remembered outputs: B (D + 1) numbers per head and slot with the log-sum-exp."""
    g = geometry
    return g.num_layers, g.max_slots * g.block_length, g.num_heads, g.head_dim
