"""FlashInfer itself: the pinned package, short lists under a plan for longer ones, and such a plan in a graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from losa_runtime.attention.flashinfer_attention import FlashInferAttention
from losa_runtime.attention.flashinfer_backend import FlashInferBackend
from losa_runtime.attention.flashinfer_interface import load_wrapper
from losa_runtime.attention.questions import KVIndices, PrefixPlan, RowGroup
from losa_runtime.attention.torch_backend import TorchBackend
from losa_runtime.cache.kv_pool import KVPool
from losa_runtime.core.batch import ForwardMode, Segment
from tests.kernels.interpreter import DEVICE
from tests.kernels.triton_world import World, lists_of, make_world, plan

pytestmark = pytest.mark.gpu

H, G, D, B, PAGE = 32, 8, 128, 16, 16


def close(got: Any, want: Any) -> None:
    torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)


def test_the_package_is_the_pinned_one() -> None:
    assert load_wrapper().__module__.startswith("flashinfer")


def world_of(lengths: list[int]) -> World:
    return make_world(lengths, H, G, D, PAGE, B, dtype=torch.bfloat16)


def attention_for(world: World) -> FlashInferAttention:
    processors = torch.cuda.get_device_properties(DEVICE).multi_processor_count
    about = (H, G, D, PAGE, world.scale, torch.bfloat16, DEVICE, processors)
    return FlashInferAttention(load_wrapper(), *about)


def chosen_for(world: World, granule: int, share: float) -> list[list[int]]:
    """Some granules per segment and KV head, the last one of each prefix among them; the first list is empty."""
    chosen = []
    for length in world.lengths:
        ends = -(-length // granule)
        for _ in range(G):
            some = torch.randperm(max(ends, 1))[: int(share * ends)].tolist()
            chosen.append(sorted({*some, ends - 1}) if ends else [])
    chosen[0] = []
    return chosen


def check(world: World, found: tuple[Tensor, Tensor], rows: list[int], chosen: list[list[int]], granule: int) -> None:
    for segment in range(len(world.lengths)):
        places = [place for place, row in enumerate(rows) if row // B == segment]
        if places:
            q = world.q[[rows[place] for place in places]]
            want = world.listed(segment, q, chosen[segment * G : (segment + 1) * G], granule)
            close(found[0][places], want[0])
            close(found[1][places], want[1])


@pytest.mark.parametrize("granule", [PAGE, 1])
def test_lists_that_are_shorter_than_planned(granule: int) -> None:
    """One plan for lists of any length: long ones in several splits, short ones whose later splits are empty, none."""
    attention, rows = attention_for(world_of([1])), [0, 1, 7, 16, 31, 32, 33, 47]
    for lengths, share in (([4000, 37, 640], 0.5), ([3000, 5, 0], 0.05), ([16, 4096, 100], 1.0)):
        world = world_of(lengths)
        chosen = chosen_for(world, granule, share)
        lists = lists_of(chosen, G, granule, [False] * 3, 4096)
        found = attention.listed(world.q, plan(world, rows), world.pages, world.segments, lists)
        check(world, found, rows, chosen, granule)
    assert len(attention._listed) == 1


def test_a_plan_in_a_graph_follows_what_lies_on_the_device() -> None:
    world, rows = world_of([2000, 300, 64]), [2, 3, 18, 40, 41]
    first, second = (chosen_for(world, PAGE, share) for share in (0.3, 0.6))
    room = [sorted({*a, *b}) for a, b in zip(first, second, strict=True)]
    static = lists_of(room, G, PAGE, [False] * 3, 2048)
    attention, planned = attention_for(world), plan(world, rows)

    def load(chosen: list[list[int]]) -> None:
        fresh = lists_of(chosen, G, PAGE, [False] * 3, 2048)
        static.indptr.copy_(fresh.indptr)
        static.indices[: len(fresh.indices)].copy_(fresh.indices)

    def run() -> tuple[Tensor, Tensor]:
        return attention.listed(world.q, planned, world.pages, world.segments, static)

    load(first)
    check(world, run(), rows, first, PAGE)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run()
    for chosen in (second, first):
        load(chosen)
        graph.replay()
        check(world, found, rows, chosen, PAGE)


def group_of(pool: KVPool, *about: tuple[int, int], mode: ForwardMode = ForwardMode.DENOISE) -> RowGroup:
    """Segments behind prefixes of some length, with so many rows each; what they see in the pages is stored."""
    free, segments, row = torch.randperm(pool.num_pages), [], 0
    for index, (length, rows) in enumerate(about):
        end = length + rows if mode.stores else length
        held, free = free[: -(-end // PAGE)].to(DEVICE), free[-(-end // PAGE) :]
        at = torch.arange(end, device=DEVICE)
        k, v = (torch.randn(end, G, D, device=DEVICE).bfloat16() for _ in range(2))
        TorchBackend(pool, H).store_kv(0, k, v, held[at // PAGE] * PAGE + at % PAGE)
        segments.append(Segment(mode, row, row + rows, length, held, slot=index))
        row += rows
    return RowGroup.of(segments, B, DEVICE)


@pytest.fixture
def pool() -> KVPool:
    return KVPool(1, 700, G, PAGE, D, torch.bfloat16, DEVICE)


def test_the_backend_reads_prompts_blocks_and_whole_prefixes(pool: KVPool) -> None:
    backend, reference = FlashInferBackend(pool, H), TorchBackend(pool, H)
    for about in ([(0, 512)], [(1024, 256), (48, 16), (0, 64)], [(160, 16), (2048, 16)]):
        group = group_of(pool, *about, mode=ForwardMode.PREFILL)
        q = torch.randn(sum(group.counts), H, D, device=DEVICE).bfloat16()
        close(backend.prefill(0, q, group).float(), reference.prefill(0, q, group).float())
    group = group_of(pool, (3000, B), (0, B), (17 * B, B))
    q = torch.randn(3 * B, H, D, device=DEVICE).bfloat16()
    close(backend.settle(backend.prefix(0, q, PrefixPlan(), group)), reference.prefix(0, q, PrefixPlan(), group))
    chosen = torch.rand(3, G, -(-3000 // PAGE), device=DEVICE) < 0.2
    chosen[1], chosen[2, :, 17:] = False, False
    listed = PrefixPlan(None, KVIndices.from_mask(chosen, (False,) * 3), PAGE)
    close(backend.settle(backend.prefix(0, q, listed, group)), reference.prefix(0, q, listed, group))
