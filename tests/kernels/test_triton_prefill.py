"""The Triton attention of stored rows against the reference: ragged requests, cut prompts, tiles and splits."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from losa_kernels.reference import attention as ref
from losa_kernels.triton.merge import merge_parts
from losa_kernels.triton.prefill import StoredRows, Tiles, attend_stored, tile_numbers
from tests.kernels.interpreter import DEVICE
from tests.kernels.triton_world import World, make_world

F32, F16 = torch.float32, torch.float16


def attend(
    world: World, q: Tensor, counts: list[int], starts: list[int], chunk: int = 128, size: int = 32
) -> tuple[Tensor, Tensor]:
    """Attention of the rows of several requests, of `counts` rows from positions `starts` on."""
    tables = [0, *torch.tensor([len(table) for table in world.tables]).cumsum(0).tolist()]
    firsts = [0, *torch.tensor(counts).cumsum(0).tolist()]
    rows = [StoredRows(*about) for about in zip(firsts[:-1], counts, starts, tables[:-1], strict=True)]
    numbers = tile_numbers(rows, q.shape[1] // world.pages.kv_heads, size)
    longest = max(start + count for start, count in zip(starts, counts, strict=True))
    tiles = Tiles(torch.tensor(numbers, device=DEVICE), torch.cat(world.tables), size, longest)
    return merge_parts(attend_stored(q, tiles, world.pages, world.scale, world.block, chunk))


def want(world: World, segment: int, q: Tensor, start: int) -> Tensor:
    caches = (world.pages.k, world.pages.v, world.tables[segment])
    return ref.block_causal_attention(q, *caches, start, world.block, world.scale)


@pytest.mark.parametrize("dtype", [F32, F16])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "page", "block"), [(4, 2, 32, 16, 8), (3, 1, 80, 4, 4), (8, 1, 16, 8, 16)]
)
def test_requests_see_their_pages_up_to_the_end_of_each_block(
    heads: int, kv_heads: int, dim: int, page: int, block: int, dtype: torch.dtype
) -> None:
    """A whole prompt, one block behind a prefix, and some blocks behind a longer one, in tiles of several blocks."""
    lengths, starts = [3 * block, 5 * block, 9 * block], [0, 4 * block, 6 * block]
    world = make_world(lengths, heads, kv_heads, dim, page, block, dtype=dtype)
    counts = [length - start for length, start in zip(lengths, starts, strict=True)]
    q = torch.randn(sum(counts), heads, dim, device=DEVICE).to(dtype)
    out, lse = attend(world, q, counts, starts)
    tolerance = {"rtol": 1e-5, "atol": 2e-6} if dtype == F32 else {"rtol": 2e-3, "atol": 2e-3}
    for index, (first, last) in enumerate(pairwise([0, *torch.tensor(counts).cumsum(0).tolist()])):
        expected = want(world, index, q[first:last].float(), starts[index])
        torch.testing.assert_close(out[first:last], expected.to(out.dtype), **tolerance)  # type: ignore[arg-type]
    assert bool(lse.isfinite().all())


def test_splits_of_long_prefixes_are_merged() -> None:
    world = make_world([300], heads=2, kv_heads=1, dim=16, page=4, block=4)
    q = torch.randn(12, 2, 16, device=DEVICE)
    out, _ = attend(world, q, [12], [288])
    torch.testing.assert_close(out, want(world, 0, q, 288), rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(out, attend(world, q, [12], [288], chunk=512)[0], rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("cuts", [(4,), (8, 12), (4, 20, 24)], ids=str)
def test_a_prompt_may_be_cut_at_any_block(cuts: tuple[int, ...]) -> None:
    world = make_world([40], heads=3, kv_heads=1, dim=16, page=4, block=4)
    q = torch.randn(40, 3, 16, device=DEVICE)
    pieces = [attend(world, q[a:b].contiguous(), [b - a], [a])[0] for a, b in pairwise((0, *cuts, 40))]
    assert torch.equal(attend(world, q, [40], [0])[0], torch.cat(pieces))


def test_what_does_not_fit_is_refused() -> None:
    world = make_world([16], heads=4, kv_heads=2)
    q = torch.randn(8, 4, 32, device=DEVICE)
    for chunk, size, message in [(100, 32, "chunk: found 100"), (128, 24, "tile size: found 24"), (128, 256, "256")]:
        with pytest.raises(ValueError, match=message):
            attend(world, q, [8], [8], chunk, size)
    with pytest.raises(ValueError, match="q: found 3 heads, allowed: multiples of 2"):
        attend(world, q[:, :3].contiguous(), [8], [8])
