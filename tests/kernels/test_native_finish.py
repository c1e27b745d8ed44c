"""The end of a layer in C++, against the reference: in-block attention, merged with fresh and remembered states."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from losa_kernels.native import attention
from losa_kernels.native.library import Kernels
from losa_kernels.reference import attention as ref
from tests.kernels.native import each_level, require_native

SEGMENTS, KV_HEADS, SPARE = 3, 2, 2  # spare: blocks of the memory that belong to nobody


class Scene(NamedTuple):
    """Blocks, what is remembered of their prefixes, and what was computed afresh."""

    q: Tensor
    k: Tensor
    v: Tensor
    block: int
    kept: attention.Kept
    fresh: attention.Fresh | None

    @property
    def scale(self) -> float:
        """The softmax scale."""
        return self.q.shape[-1] ** -0.5

    def finish(self, kernels: Kernels) -> Tensor:
        """The kernel's answer; the memory is written to."""
        return attention.finish_block(kernels, *self[:4], self.scale, self.kept, self.fresh)

    def expected(self) -> tuple[Tensor, attention.Kept]:
        """The reference's answer, and the memory after it."""
        kept = attention.Kept(self.kept.out.clone(), self.kept.lse.clone(), self.kept.place)
        place = torch.arange(self.q.shape[0]) if kept.place is None else kept.place
        states = kept.out[place], kept.lse[place]
        if self.fresh is not None:
            states = ref.renew_states(kept.out, kept.lse, place, *self.fresh)
        shaped = (x.view(-1, self.block, *x.shape[1:]) for x in (self.q, self.k, self.v))
        inside = ref.block_attention(*shaped, self.scale)
        return ref.merge_states(*states, *(x.flatten(0, 1) for x in inside))[0], kept

    def alone(self, segment: int) -> Scene:
        """One block by itself, over a copy of the memory."""
        mine = slice(segment * self.block, (segment + 1) * self.block)
        assert self.fresh is not None and self.fresh.rows is not None and self.kept.place is not None
        planned = ((self.fresh.rows // self.block) == segment).nonzero().flatten()
        heads = None if self.fresh.heads is None else self.fresh.heads[planned]
        rows = self.fresh.rows[planned] - mine.start
        fresh = attention.Fresh(self.fresh.out[planned], self.fresh.lse[planned], rows, heads)
        kept = attention.Kept(self.kept.out.clone(), self.kept.lse.clone(), self.kept.place[mine])
        return Scene(self.q[mine], self.k[mine], self.v[mine], self.block, kept, fresh)


def states(count: int, heads: int, dim: int) -> tuple[Tensor, Tensor]:
    """Every third row has no keys."""
    out, lse = torch.randn(count, heads, dim), 3.0 * torch.randn(count, heads)
    out[::3], lse[::3] = 0.0, -torch.inf
    return out, lse


def scene(block: int = 8, share: int = 4, dim: int = 32, planned: str = "some", by_head: bool = False) -> Scene:
    """planned: "none", "all" (without naming them), "every" or "some" rows; by_head: only some of their heads count."""
    rows, heads = SEGMENTS * block, KV_HEADS * share
    places = torch.randperm(SEGMENTS + SPARE)[:SEGMENTS, None] * block + torch.arange(block)
    some = [1, block - 1, block, 2 * block + 2]
    listed = {"none": [], "all": None, "every": list(range(rows)), "some": some}[planned]
    count = rows if listed is None else len(listed)
    fresh = attention.Fresh(
        *states(count, heads, dim),
        rows=None if listed is None else torch.tensor(listed, dtype=torch.int64),
        heads=torch.rand(count, heads) < 0.5 if by_head else None,
    )
    kept = attention.Kept(*states((SEGMENTS + SPARE) * block, heads, dim), places.flatten())
    k, v = torch.randn(2, rows, KV_HEADS, dim)
    return Scene(torch.randn(rows, heads, dim), k, v, block, kept, fresh)


def check(level: str, given: Scene) -> None:
    """The output is the reference's to rounding, the memory is to the bit."""
    want, kept = given.expected()
    torch.testing.assert_close(given.finish(require_native(level)), want, rtol=1e-5, atol=2e-6)
    assert torch.equal(given.kept.out, kept.out) and torch.equal(given.kept.lse, kept.lse)


@each_level
@pytest.mark.parametrize("dim", [32, 64, 80, 128, 256])
@pytest.mark.parametrize(("block", "share"), [(4, 1), (4, 8), (16, 4), (32, 2), (32, 8)])
def test_blocks_of_every_size(level: str, block: int, share: int, dim: int) -> None:
    check(level, scene(block, share, dim))


@each_level
@pytest.mark.parametrize("by_head", [False, True])
@pytest.mark.parametrize("planned", ["none", "all", "every", "some"])
def test_rows_and_heads_of_every_kind(level: str, planned: str, by_head: bool) -> None:
    check(level, scene(planned=planned, by_head=by_head))


@each_level
def test_remembered_states_alone_stay_as_they_are(level: str) -> None:
    given = scene()
    check(level, given._replace(fresh=None))
    own = attention.Kept(*states(given.q.shape[0], *given.q.shape[1:]))
    check(level, given._replace(kept=own))
    check(level, given._replace(kept=own, fresh=None))


@each_level
def test_rows_without_a_prefix_are_left_with_their_block(level: str) -> None:
    kernels, given = require_native(level), scene(planned="all")
    assert given.fresh is not None
    given.fresh.out.zero_()
    given.fresh.lse.fill_(-torch.inf)
    inside, _ = attention.block(kernels, *given[:4], given.scale)
    assert torch.equal(given.finish(kernels), inside)


@each_level
@pytest.mark.parametrize("lse", [-80.0, 80.0])
def test_one_part_may_outweigh_the_other(level: str, lse: float) -> None:
    given = scene()
    assert given.fresh is not None
    for part in (given.kept.lse, given.fresh.lse):
        part.fill_(lse)
    check(level, given)


@each_level
@pytest.mark.parametrize("by_head", [False, True])
def test_the_same_bits_alone_in_company_and_with_two_threads(level: str, by_head: bool, two_threads: None) -> None:
    kernels, given = require_native(level), scene(block=16, share=5, dim=72, by_head=by_head)
    parts = [given.alone(segment) for segment in range(SEGMENTS)]
    torch.set_num_threads(1)
    alone = torch.cat([part.finish(kernels) for part in parts])
    torch.set_num_threads(2)
    assert torch.equal(given.finish(kernels), alone)
    for part in parts:
        assert torch.equal(part.kept.out[part.kept.place], given.kept.out[part.kept.place])
        assert torch.equal(part.kept.lse[part.kept.place], given.kept.lse[part.kept.place])
