"""What the C++ kernels refuse before they read or write anything, and how the library is found."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from losa_kernels.native import attention, library, selection
from losa_kernels.native.layout import Pages, Segments
from losa_kernels.native.library import LEVELS, Kernels, NativeUnavailable, NativeUnfit
from losa_kernels.native.mass import prefix_mass
from losa_kernels.native.store import store
from tests.kernels.native import World, make_world, require_native, segments_of, under_another_name


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


def prefix(world: World, **changed: Any) -> None:
    given: dict[str, Any] = {"q": world.q, "rows": None, "lists": None, "segments": world.segments} | changed
    attention.prefix(require_native(), world.pages, given["segments"], given["q"], 1.0, given["rows"], given["lists"])


def lists(indptr: Tensor, indices: Tensor, heads: int = 2, granule: int = 16) -> attention.Lists:
    return attention.Lists(indptr, indices, heads, [False, False], granule)


CASES: dict[str, tuple[Callable[[World], object], str]] = {
    "dtype of q": (lambda w: prefix(w, q=w.q.double()), "q: found torch.float64"),
    "head dim of q": (lambda w: prefix(w, q=w.q[..., :8].contiguous()), "q: found shape"),
    "strided q": (lambda w: prefix(w, q=w.q.transpose(0, 1).contiguous().transpose(0, 1)), "not contiguous"),
    "q on another device": (lambda w: prefix(w, q=w.q.to("meta")), "on meta"),
    "too few rows": (lambda w: prefix(w, q=w.q[1:].contiguous()), "rows: found 15 of 15"),
    "heads that cannot share": (lambda w: prefix(w, q=w.q[:, :3].contiguous()), "3 query heads cannot share 2"),
    "unsorted rows": (lambda w: prefix(w, rows=ints(3, 1)), "rows: found 1 after 3"),
    "row behind the end": (lambda w: prefix(w, rows=ints(1, 16)), "rows: found 16"),
    "negative row": (lambda w: prefix(w, rows=ints(-1)), "rows: found -1"),
    "rows of int32": (lambda w: prefix(w, rows=ints(1).int()), "rows: found torch.int32"),
    "page behind the pool": (lambda w: prefix(w, segments=tables(w, ints(0, 1, 99), ints(2))), "page 99"),
    "negative page": (lambda w: prefix(w, segments=tables(w, ints(0, -1, 1), ints(2))), "page -1"),
    "short table": (lambda w: prefix(w, segments=tables(w, ints(0, 1), ints(2))), "2 pages of 16 do not cover"),
    "short indptr": (lambda w: prefix(w, lists=lists(ints(0, 0, 0), ints())), "indptr: found shape"),
    "indptr past the indices": (lambda w: prefix(w, lists=lists(ints(0, 1, 1, 1, 2), ints(0))), "indptr: found 0 to 2"),
    "falling indptr": (lambda w: prefix(w, lists=lists(ints(0, 1, 0, 1, 1), ints(0))), "indptr: falls"),
    "granule outside": (lambda w: prefix(w, lists=lists(ints(0, 1, 1, 1, 1), ints(4))), "found 4 after -1"),
    "repeated granule": (lambda w: prefix(w, lists=lists(ints(0, 2, 2, 2, 2), ints(1, 1))), "found 1 after 1"),
    "granule of nothing": (lambda w: prefix(w, lists=lists(ints(0, 0, 0, 0, 0), ints(), 2, 0)), "granules of 0"),
    "lists of too few heads": (lambda w: prefix(w, lists=lists(ints(0, 0, 0), ints(), 1)), "lists for 1 heads"),
    "best of nothing": (lambda w: select(w, ints(0, 1)), "best: found 0"),
    "a mask of other rows": (lambda w: select(w, ints(1, 1), torch.ones(3, 4).bool()), "heads: found shape"),
    "a mask of numbers": (lambda w: select(w, ints(1, 1), torch.ones(16, 4)), "heads: found torch.float32"),
    "best of the wrong shape": (lambda w: select(w, ints(1)), "best: found shape"),
    "mass of nothing": (lambda w: massed(w, 0), "granule: found 0"),
    "mass of other rows": (lambda w: massed(w, q=w.q[1:].contiguous()), "rows: found 15"),
    "mass of a page behind the pool": (lambda w: massed(w, segments=tables(w, ints(0, 1, 99), ints(2))), "page 99"),
    "mass without a log-sum-exp": (lambda w: massed(w, lse=torch.zeros(16, 3)), "lse: found shape"),
    "mass of heads that cannot share": (lambda w: massed(w, q=w.q[:, :3].contiguous()), "3 query heads cannot share 2"),
    "location behind the pool": (lambda w: keep(w, ints(16 * 99)), "locations: found 1584"),
    "negative location": (lambda w: keep(w, ints(-1)), "locations: found -1"),
    "too few locations": (lambda w: keep(w, ints()), "locations: found shape"),
    "slot behind the memory": (lambda w: changed(w, ints(0, 3)), "slot: found 3"),
    "memory of another dtype": (lambda w: changed(w, ints(0, 1), torch.float16), "now: found torch.float32"),
    "prefill of broken blocks": (lambda w: prefilled(w, ints(12, 4)), "whole blocks of 8"),
    "prefill of other rows": (lambda w: prefilled(w, ints(8, 16)), "rows: found 16"),
    "uneven block": (lambda w: blocks(w, 5), "whole blocks of 5"),
    "states at a place twice": (lambda w: finish(w, place=ints(*range(15), 3)), "place: found 3 twice"),
    "states behind the memory": (lambda w: finish(w, place=ints(*range(1, 16), 24)), "found 24, allowed: 0 to 23"),
    "states before the memory": (lambda w: finish(w, place=ints(-1, *range(1, 16))), "place: found -1"),
    "places of other rows": (lambda w: finish(w, place=ints(1, 2)), "place: found shape"),
    "places of int32": (lambda w: finish(w, place=ints(*range(16)).int()), "place: found torch.int32"),
    "states of other rows": (lambda w: finish(w, place=None), "states of the prefix: found 24, allowed: 16"),
    "states of other heads": (lambda w: finish(w, kept=torch.ones(24, 3, 32)), "kept out: found shape"),
    "states of double": (lambda w: finish(w, kept=torch.ones(24, 4, 32).double()), "kept out: found torch.float64"),
    "strided states": (lambda w: finish(w, kept=torch.ones(24, 32, 4).transpose(1, 2)), "kept out: .* not contiguous"),
    "states without a log-sum-exp": (lambda w: finish(w, lse=torch.ones(24)), "kept lse: found shape"),
    "unsorted fresh rows": (lambda w: finish(w, rows=ints(3, 1)), "fresh rows: found 1 after 3"),
    "fresh rows twice": (lambda w: finish(w, rows=ints(3, 3)), "fresh rows: found 3 after 3"),
    "fresh row behind the end": (lambda w: finish(w, rows=ints(1, 16)), "fresh rows: found 16"),
    "negative fresh row": (lambda w: finish(w, rows=ints(-1, 1)), "fresh rows: found -1"),
    "fresh states of other rows": (lambda w: finish(w, rows=ints(1, 2, 3)), "fresh out: found shape"),
    "fresh states without rows": (lambda w: finish(w, rows=None), "fresh out: found shape"),
    "fresh states without a log-sum-exp": (lambda w: finish(w, new_lse=torch.ones(2)), "fresh lse: found shape"),
    "fresh heads of other rows": (lambda w: finish(w, heads=torch.ones(3, 4).bool()), "heads: found shape"),
    "fresh heads of numbers": (lambda w: finish(w, heads=torch.ones(2, 4)), "heads: found torch.float32"),
    "a block to finish without heads": (lambda w: finish(w, q=w.q[:, 0].contiguous()), "q: found shape"),
    "pages of double": (lambda w: Pages(w.pages.k.double(), w.pages.v), "k: found torch.float64"),
    "v unlike k": (lambda w: Pages(w.pages.k, w.pages.v[1:]), "v: found shape"),
    "bounds unlike k": (lambda w: Pages(w.pages.k, w.pages.v, w.pages.k), "bounds: found shape"),
    "moments unlike k": (lambda w: Pages(w.pages.k, w.pages.v, None, w.pages.k), "moments: found shape"),
    "halved moments": (lambda w: Pages(w.pages.k, w.pages.v, None, w.pages.bounds.half()), "moments: found torch.f"),
    "huge head dim": (lambda w: Pages(*torch.zeros(2, 1, 1, 1, 513)), "head dim 513"),
    "indptr unlike its table": (lambda w: Segments(ints(0, 3), ints(1, 2), ints(5), 4), "table_indptr"),
    "no bounds to score": (lambda w: select(without_bounds(w), ints(1, 1)), "no page bounds"),
}  # fmt: skip


def tables(world: World, *each: Tensor) -> Segments:
    return segments_of(list(each), world.lengths, world.block)


def without_bounds(world: World) -> World:
    return world._replace(pages=Pages(world.pages.k, world.pages.v))


def select(world: World, best: Tensor, heads: Tensor | None = None) -> None:
    asked = (world.q, None, [False, False], best)
    selection.select_pages(require_native(), world.pages, world.segments, *asked, heads_nH=heads)


def massed(world: World, granule: int = 16, **changed: Any) -> None:
    given: dict[str, Any] = {"q": world.q, "segments": world.segments} | changed
    lse = given.get("lse", torch.zeros(given["q"].shape[:2]))
    prefix_mass(require_native(), world.pages, given["segments"], given["q"], lse, 1.0, granule)


def keep(world: World, locations: Tensor) -> None:
    k = torch.zeros(1, 2, 32)
    store(require_native(), world.pages, k, k, locations)


def changed(world: World, slots: Tensor, dtype: torch.dtype = torch.float32) -> None:
    memory = torch.zeros(3, world.block, 4, 32, dtype=dtype)
    selection.changed_rows(require_native(), world.q, memory, slots, [False, False], ints(1, 1), torch.zeros(2))


def prefilled(world: World, counts: Tensor) -> None:
    segments = segments_of(world.tables, [0, 0], world.block)
    attention.prefill(require_native(), world.pages, segments, world.q, counts, 1.0)


def blocks(world: World, length: int) -> None:
    k = torch.zeros(16, 2, 32)
    attention.block(require_native(), world.q, k, k, length, 1.0)


def finish(world: World, **changed: Any) -> None:
    """A block finished with two fresh rows and a memory of 24 places, which stays as it is."""
    k = torch.zeros(16, 2, 32)
    kept, lse = changed.get("kept", torch.ones(24, 4, 32)), changed.get("lse", torch.ones(24, 4))
    place, rows = changed.get("place", ints(*range(16))), changed.get("rows", ints(1, 2))
    new = attention.Fresh(torch.zeros(2, 4, 32), changed.get("new_lse", torch.zeros(2, 4)), rows, changed.get("heads"))
    try:
        where = (world.block, 1.0, attention.Kept(kept, lse, place), new)
        attention.finish_block(require_native(), changed.get("q", world.q), k, k, *where)
    finally:
        assert bool((kept == 1.0).all() and (lse == 1.0).all())


@pytest.mark.parametrize("case", CASES)
def test_bad_arguments_are_refused(case: str) -> None:
    world = make_world([40, 32], block=8)
    before = world.pages.k.clone()
    attempt, message = CASES[case]
    with pytest.raises(ValueError, match=message):
        attempt(world)
    assert torch.equal(world.pages.k.nan_to_num(7.0), before.nan_to_num(7.0))


def test_the_best_level_is_taken_unless_another_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    offered = require_native().offered
    assert "portable" in offered and Kernels().level == offered[-1]
    monkeypatch.setenv("LOSA_SIMD", "portable")
    assert Kernels().level == "portable" and Kernels(offered[-1]).level == offered[-1]
    monkeypatch.setenv("LOSA_SIMD", "mmx")
    with pytest.raises(NativeUnfit, match="LOSA_SIMD: found 'mmx', this CPU offers: portable"):
        Kernels()
    with pytest.raises(NativeUnavailable, match="level: found 'sse', this CPU offers: portable"):
        Kernels("sse")


def test_a_missing_or_broken_or_stale_library_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    require_native()
    with pytest.raises(NativeUnavailable, match="was not built: run `make kernels`"):
        Kernels(file=tmp_path / "none.so")
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"not a library")
    with pytest.raises(NativeUnfit, match=r"broken\.so cannot be loaded .* run `make kernels`"):
        Kernels(file=broken)
    monkeypatch.setattr(library, "ABI", library.ABI + 1)
    with pytest.raises(NativeUnfit, match=rf"\.so has interface {library.ABI - 1}, needed: {library.ABI}; run"):
        Kernels(file=under_another_name())


def test_an_unknown_level_is_refused_by_the_library_too() -> None:
    kernels, world = require_native(), make_world([20, 20])
    kernels.level = LEVELS[0]
    attention.prefix(kernels, world.pages, world.segments, world.q, 1.0)
    assert kernels._library.losa_has_level(len(LEVELS)) == 0


def test_loading_needs_no_backend_and_importing_needs_no_library() -> None:
    code = "import losa_kernels.native.attention, sys; sys.exit(any(m.startswith('losa_runtime') for m in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
