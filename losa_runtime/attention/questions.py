"""What an attention backend is asked, and what it answers: rows, lists of what they read, states. Knows no backend.

A question says which rows of a group of segments read which pages; it does not say why, nor for which request.
T rows of the batch, R rows of a group, S segments, B block length, H query heads, G KV heads, D head dim, P pages.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import accumulate, pairwise
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from losa_kernels.reference import selection
from losa_kernels.triton.layout import Planned
from losa_runtime.cache.transfer import queued
from losa_runtime.core.batch import Segment

Rows: TypeAlias = Tensor | Planned
"""Planned rows of a group: int64, sorted; or, where only the device knows how many they are, in room for more. A method
hands on what a backend's `changed_rows` gave it, as it is."""


class AttnState(NamedTuple):
    """Attention over some keys: out normalised, lse natural and float32. No keys: out 0, lse -inf."""

    out_RHD: Tensor
    lse_RH: Tensor


class AttnParts(NamedTuple):
    """Attention of planned rows, cut along the keys, until its backend settles it: float32 [C, n, H, D] and [C, n, H].

    A part without keys has lse -inf and an undefined out. What lies behind the last row is undefined.
    """

    out_CnHD: Tensor
    lse_CnH: Tensor
    rows: Planned


PrefixState: TypeAlias = AttnState | AttnParts  # what a backend answers; `settle` makes a state of either


class RenewedStates(NamedTuple):
    """Attention of R rows to their prefixes: fresh for the planned rows, remembered from an earlier step for the rest.

    A fresh state also replaces the remembered one, but only when a backend is given this: whoever makes one hands it
    on, once, and reads the memory not before.
    kept: the memory, out [Y, H, D] and lse [Y, H] float32, written to. place_R: int64, each row's place in it, no two
    the same. rows: the planned rows as in the plan (None = all). fresh: their states, in order. heads_nH: bool, the
    heads of each planned row whose fresh state counts; the others keep the remembered one. None = all.
    """

    kept: AttnState
    place_R: Tensor
    rows: Rows | None
    fresh: PrefixState
    heads_nH: Tensor | None = None


class ScoreKind(Enum):
    """What a score says of a granule of the prefix."""

    BOUND = "bound"  # an upper bound of q . k over its keys, from Summary.KEY_BOUNDS


class KVIndices(NamedTuple):
    """Which granules of the prefix are read, as lists in CSR form.

    indptr: int64 [E + 1]; list e is indices[indptr[e] : indptr[e + 1]]: granule numbers inside the request's prefix,
    sorted and unique. The lists are ordered by owner, then head. An owner is a segment of the group, or with `per_row`
    a row of the plan; heads is G (one list per KV head, shared by its query heads) or H.
    whole: per segment, True = read the whole prefix instead; its lists are empty.
    most: bound on the granules of any list, where the host has one. Lists made on the device lie in room for more: then
    `indices` is longer than the lists, and with `per_row` there are empty lists behind those of the last planned row.
    """

    indptr: Tensor
    indices: Tensor
    heads: int
    whole: tuple[bool, ...]
    per_row: bool = False
    most: int | None = None

    def mask(self, owner: int, width: int) -> Tensor:
        """The lists of one owner as a bool mask [heads, width]."""
        ends = self.indptr[owner * self.heads : (owner + 1) * self.heads + 1]
        head = torch.repeat_interleave(torch.arange(self.heads, device=ends.device), ends.diff())
        marked = torch.zeros(self.heads, width, dtype=torch.bool, device=ends.device)
        marked[head, self.indices[int(ends[0]) : int(ends[-1])]] = True
        return marked

    @classmethod
    def from_mask(cls, chosen_OEP: Tensor, whole: tuple[bool, ...], per_row: bool = False) -> KVIndices:
        """Lists per owner and head from a bool mask; the mask of whole segments is empty."""
        ends = chosen_OEP.sum(-1).flatten().cumsum(0)
        indptr = torch.cat((ends.new_zeros(1), ends))
        return cls(indptr, chosen_OEP.nonzero()[:, -1], chosen_OEP.shape[1], whole, per_row)


class PrefixPlan(NamedTuple):
    """The question a sparse method puts to a backend.

    rows: rows of the group whose prefix attention is computed; None = all, empty = none.
    kv: what they read; None = the whole prefix. granule: tokens per index of `kv`.
    scored: per segment, True where choosing `kv` read the page summaries, if any of its rows is planned (None =
    nowhere). For the record only.
    peaks: an output, float32 [planned rows, H, P]: where a row reads its whole prefix, the backend writes the row's
    largest scaled score q . k in each page; every other entry becomes -inf. None = not wanted.
    """

    rows: Rows | None = None
    kv: KVIndices | None = None
    granule: int = 1
    scored: tuple[bool, ...] | None = None
    peaks: Tensor | None = None

    @property
    def known_rows(self) -> Tensor | None:
        """The rows, for a backend that plans no others than those whose number the host knows."""
        return known(self.rows)


@dataclass(frozen=True, eq=False)
class RowGroup:
    """Segments whose rows are computed together. Tensors given beside a group hold its rows and no others, in order.

    where: the place of the rows in the batch. counts: rows per segment (B for a block segment). block_length: B; the
    length of all its segments for a group of blocks that are shorter.
    """

    segments: tuple[Segment, ...]
    where: slice | Tensor
    counts: tuple[int, ...]
    block_length: int

    @classmethod
    def of(cls, segments: Sequence[Segment], block_length: int, device: torch.device) -> RowGroup:
        """The group of these segments; neighbours in the batch are taken by a view instead of a copy."""
        counts = tuple(segment.stop - segment.start for segment in segments)
        assert segments and all(count > 0 and count % block_length == 0 for count in counts)
        where: slice | Tensor
        if all(left.stop == right.start for left, right in pairwise(segments)):
            where = slice(segments[0].start, segments[-1].stop)
        else:
            spans = [torch.arange(segment.start, segment.stop) for segment in segments]
            where = queued(torch.cat(spans), device)
        return cls(tuple(segments), where, counts, block_length)

    @property
    def starts(self) -> tuple[int, ...]:
        """First row of each segment inside the group."""
        return (0, *accumulate(self.counts[:-1]))

    @property
    def prefix_lens(self) -> tuple[int, ...]:
        """Committed tokens before each segment."""
        return tuple(segment.prefix_len for segment in self.segments)

    @property
    def padding(self) -> bool:
        """Whether no segment has anything to unmask: what a recording is made on, with bounds in place of lengths."""
        return all(segment.masked == () for segment in self.segments)

    def take(self, x_T: Tensor) -> Tensor:
        """The group's rows of a tensor over the batch."""
        return x_T[self.where]

    def put(self, into_T: Tensor, x_R: Tensor) -> None:
        """Write the group's rows into a tensor over the batch, rounding to its dtype."""
        into_T[self.where] = x_R.to(into_T.dtype)


class PageChoice(NamedTuple):
    """How the rows of a segment choose pages.

    share: "max", "mean" = one list per KV head, by the largest or the mean score of its query heads; "none" = a list
    per query head. per_row: each row keeps its own list; otherwise all rows of a segment share the union of theirs.
    """

    share: selection.Share = "max"
    per_row: bool = False


class SelectedPages(NamedTuple):
    """Pages to read, and `scored` as in PrefixPlan."""

    kv: KVIndices
    scored: tuple[bool, ...]


def known(rows: Rows | None) -> Tensor | None:
    """Rows whose number the host knows: those of a backend that plans no others, or that a method listed itself."""
    assert not isinstance(rows, Planned), "rows that only the device can count are for the backend that planned them"
    return rows


class PerSegment(NamedTuple):
    """A number per segment: int64 on the device, and on the host, which needs it for bounds."""

    device_S: Tensor
    host: tuple[int, ...]


class ActiveRules(NamedTuple):
    """Which rows of each segment are recomputed: by the rules of `reference.selection.active_rows`, or all.

    count_S: int64; tau_S: float32. fresh: segments all of whose rows are. most: bound on the rows of each segment.
    keep_stable: a row that is not recomputed keeps the query with which it is compared the next time.
    """

    count_S: Tensor
    tau_S: Tensor
    fresh: tuple[bool, ...]
    most: tuple[int, ...]
    keep_stable: bool = False
