"""The Triton end of a layer against the reference: blocks, remembered and fresh states, and what is remembered next."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from losa_kernels.reference import attention as ref
from losa_kernels.triton.block import Fresh, Kept, attend_block, finish_block
from losa_kernels.triton.layout import Parts, Planned
from tests.kernels.interpreter import DEVICE

F32, F16 = torch.float32, torch.float16
SLOTS = 5


def close(got: Tensor, want: Tensor, dtype: torch.dtype = F32) -> None:
    tolerance = {"rtol": 1e-5, "atol": 2e-6} if dtype == F32 else {"rtol": 2e-3, "atol": 2e-3}
    torch.testing.assert_close(got.float(), want.float(), **tolerance)  # type: ignore[arg-type]


def draw(*shape: int, dtype: torch.dtype = F32) -> Tensor:
    return torch.randn(shape, device=DEVICE).to(dtype)


def rows_of(
    segments: int, block: int, heads: int, kv_heads: int, dim: int, dtype: torch.dtype = F32
) -> tuple[Tensor, Tensor, Tensor]:
    rows = segments * block
    return (
        draw(rows, heads, dim, dtype=dtype),
        draw(rows, kv_heads, dim, dtype=dtype),
        draw(rows, kv_heads, dim, dtype=dtype),
    )


def reference_block(q: Tensor, k: Tensor, v: Tensor, block: int) -> tuple[Tensor, Tensor]:
    blocks = (x.view(-1, block, *x.shape[1:]) for x in (q, k, v))
    out, lse = ref.block_attention(*blocks, q.shape[2] ** -0.5)
    return out.flatten(0, 1), lse.flatten(0, 1)


def planned_rows(rows: list[int], total: int) -> Planned:
    """What the end of a layer needs of planned rows: their order."""
    order = torch.full((total,), -1)
    order[rows] = torch.arange(len(rows))
    return Planned(torch.tensor(rows, device=DEVICE), torch.zeros(1, device=DEVICE), order.to(DEVICE))


@pytest.mark.parametrize("dtype", [F32, F16])
@pytest.mark.parametrize(("block", "heads", "kv_heads", "dim"), [(4, 4, 2, 32), (8, 3, 1, 80), (16, 4, 1, 128)])
def test_blocks_attend_to_themselves(block: int, heads: int, kv_heads: int, dim: int, dtype: torch.dtype) -> None:
    q, k, v = rows_of(3, block, heads, kv_heads, dim, dtype)
    out, lse = attend_block(q, k, v, block, dim**-0.5)
    want, want_lse = reference_block(q, k, v, block)
    close(out, want, dtype)
    close(lse, want_lse, dtype)


@pytest.mark.parametrize(("block", "heads", "kv_heads"), [(32, 8, 1), (5, 1, 1)])
def test_a_remembered_state_is_merged(block: int, heads: int, kv_heads: int) -> None:
    """Of the slots named by the places and no other; one row has no prefix, and what lies there means nothing."""
    q, k, v = rows_of(2, block, heads, kv_heads, 64)
    place = torch.cat([slot * block + torch.arange(block) for slot in (3, 0)]).to(DEVICE)
    kept_out, kept_lse = draw(SLOTS * block, heads, 64), draw(SLOTS * block, heads)
    kept_lse[place[1]], kept_out[place[1]] = -torch.inf, torch.nan
    kept_out[block : 3 * block] = torch.nan  # slots of others
    got = finish_block(q, k, v, block, 64**-0.5, Kept(kept_out, kept_lse, place))
    own = reference_block(q, k, v, block)
    want = ref.merge_states(kept_out[place].nan_to_num(), kept_lse[place], *own)[0]
    close(got, want)


@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize(("block", "heads", "kv_heads"), [(8, 4, 2), (4, 6, 1)])
def test_fresh_states_replace_remembered_ones(block: int, heads: int, kv_heads: int, per_head: bool) -> None:
    """Planned rows are computed from their parts, the others from memory; memory then holds what was used."""
    segments, dim, scale = 3, 32, 32**-0.5
    q, k, v = rows_of(segments, block, heads, kv_heads, dim)
    total = len(q)
    place = torch.cat([slot * block + torch.arange(block) for slot in (4, 1, 2)]).to(DEVICE)
    kept_out, kept_lse = draw(SLOTS * block, heads, dim), draw(SLOTS * block, heads)
    rows = [1, 2, block, total - 1]
    room = total
    parts = Parts(torch.full((3, room, heads, dim), torch.nan, device=DEVICE), torch.full((3, room, heads), -torch.inf))
    parts = Parts(parts.out, parts.lse.to(DEVICE))
    for split, place_in_plan in ((0, 0), (0, 1), (1, 1), (2, 1), (2, 3)):  # the row at place 2 read nothing
        parts.out[split, place_in_plan] = draw(heads, dim)
        parts.lse[split, place_in_plan] = draw(heads) * 5
    taking = torch.rand(room, heads, device=DEVICE) < 0.5 if per_head else None

    want_out, want_lse = kept_out.clone(), kept_lse.clone()
    for number, row in enumerate(rows):
        state = (torch.zeros(heads, dim, device=DEVICE), torch.full((heads,), -torch.inf, device=DEVICE))
        for split in range(3):
            merged = ref.merge_states(*state, parts.out[split, number].nan_to_num(), parts.lse[split, number])
            state = (merged[0], merged[1])
        for head in range(heads):
            if taking is None or taking[number, head]:
                want_out[place[row], head], want_lse[place[row], head] = state[0][head], state[1][head]

    kept = Kept(kept_out, kept_lse, place)
    got = finish_block(q, k, v, block, scale, kept, Fresh(parts, planned_rows(rows, total), taking))
    close(kept_out, want_out)
    close(kept_lse, want_lse)
    untouched = torch.ones(SLOTS * block, dtype=torch.bool, device=DEVICE)
    untouched[place[rows]] = False
    assert torch.equal(kept_out[untouched], want_out[untouched])
    close(got, ref.merge_states(want_out[place], want_lse[place], *reference_block(q, k, v, block))[0])


def test_memory_in_sixteen_bits() -> None:
    q, k, v = rows_of(1, 4, 2, 1, 32)
    kept = Kept(draw(4, 2, 32, dtype=F16), draw(4, 2), torch.arange(4, device=DEVICE))
    parts = Parts(draw(1, 4, 2, 32), draw(1, 4, 2))
    finish_block(q, k, v, 4, 32**-0.5, kept, Fresh(parts, planned_rows([2], 4)))
    assert torch.equal(kept.out[2], parts.out[0, 0].to(F16)) and torch.equal(kept.lse[2], parts.lse[0, 0])


def test_the_same_bits_alone_and_in_company() -> None:
    block, heads, dim = 4, 4, 32
    q, k, v = rows_of(3, block, heads, 1, dim)
    kept_out, kept_lse = draw(3 * block, heads, dim), draw(3 * block, heads)
    parts = Parts(draw(4, 12, heads, dim), draw(4, 12, heads))
    parts.lse[2:, 0] = -torch.inf  # the row of the first segment has two parts, its neighbours four
    rows = [2, 4, 9]
    together = Kept(kept_out.clone(), kept_lse.clone(), torch.arange(12, device=DEVICE))
    all_of_them = finish_block(q, k, v, block, 0.2, together, Fresh(parts, planned_rows(rows, 12)))
    alone = Kept(kept_out.clone(), kept_lse.clone(), torch.arange(4, device=DEVICE))
    mine = Parts(parts.out[:2, :1].clone(), parts.lse[:2, :1].clone())
    one = finish_block(q[:4], k[:4], v[:4], block, 0.2, alone, Fresh(mine, planned_rows([2], 4)))
    assert torch.equal(one, all_of_them[:4]) and torch.equal(alone.out[:4], together.out[:4])


def test_what_does_not_fit_is_refused() -> None:
    q, k, v = rows_of(2, 4, 4, 2, 32)
    with pytest.raises(ValueError, match="found 8 rows, 4 heads, allowed: multiples of 3, 2"):
        attend_block(q, k, v, 3, 0.2)
    with pytest.raises(ValueError, match="v: found shape"):
        attend_block(q, k, v[:4], 4, 0.2)
    kept = Kept(draw(8, 4, 32), draw(8, 3), torch.arange(8, device=DEVICE))
    with pytest.raises(ValueError, match="kept lse: found shape"):
        finish_block(q, k, v, 4, 0.2, kept)
