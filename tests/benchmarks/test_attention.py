"""The attention benchmark: it runs and says what is asked of it, its queries are what they claim, its floors add up."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from benchmarks import attention, attention_data
from benchmarks.attention_ceiling import Ceiling
from benchmarks.attention_variants import Need
from losa_kernels.reference.paging import key_bounds
from tests.kernels.native import require_native

SIZES = attention_data.Sizes(16, 8, 2, 64)
TINY = "--context 512 --heads 4 --kv-heads 2 --head-dim 16 --budget 64 --active 3 --rounds 1 --repeats 1 --quick"
RATIOS = {
    "dense_vs_sdpa",
    "quest_step_vs_sdpa",
    "losa_step_vs_sdpa",
    "losa_step_vs_quest",
    "losa_plus_step_vs_sdpa",
    "mage_step_vs_sdpa",
    "losa_block_vs_sdpa",
    "losa_block_unfused_vs_sdpa",
    "dense_block_vs_sdpa",
}


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def choice() -> attention_data.Choice:
    """1,024 pages of 16, of which a row selects 32."""
    keys = attention_data.keys(16384, 2, 64, 16, torch.Generator().manual_seed(0))
    pages = keys.view(1024, 16, 2, 64).transpose(1, 2).contiguous()
    return attention_data.Choice(key_bounds(pages, torch.full((1024,), 16)), 32)


@pytest.mark.parametrize("heads", [0.0, 1.0])
def test_unions_grow_as_in_the_figure(choice: attention_data.Choice, heads: float) -> None:
    found = attention_data.like_figure_3(SIZES, heads, choice)
    grown = [choice.growth_GR(attention_data.opening(SIZES, found, seed)).double().mean(0) for seed in range(100, 110)]
    mean_R = torch.stack(grown).mean(0)
    torch.testing.assert_close(mean_R / mean_R[-1], torch.tensor(attention_data.FIGURE_3).double(), rtol=0.0, atol=0.08)


def test_unions_are_as_wide_as_asked(choice: attention_data.Choice) -> None:
    for share in (0.05, 0.1):
        found = attention_data.union_of(5, share, SIZES, 0.5, choice)
        grown = [choice.growth_GR(attention_data.opening(SIZES, found, seed))[:, 4] for seed in range(100, 110)]
        assert float(torch.stack(grown).double().mean()) / 1024 == pytest.approx(share, rel=0.1)
    assert attention_data.union_of(5, 0.9, SIZES, 0.5, choice).rows[0] == pytest.approx(0.0, abs=1e-3)  # the widest


def test_active_rows_change_and_the_others_hardly() -> None:
    locality = attention_data.Locality((0.99,) * 16, 0.5)
    made = attention_data.queries(6, 5, SIZES, locality, seed=1)
    change = (made[1:] - made[:-1]).square().sum((-1, -2)) / made[:-1].square().sum((-1, -2))
    assert (change > 1e-3).sum(-1).tolist() == [5] * 5 and float(change.sort(-1).values[:, 10].max()) < 1e-6


def test_the_floor_is_the_slower_of_reading_and_computing() -> None:
    ceiling = Ceiling(read=100.0, gemm={4: 10.0, 64: 50.0})
    assert Need(1000.0, {64: 100.0}).seconds(ceiling) == 10.0
    assert Need(100.0, {60: 100.0, 5: 30.0}).seconds(ceiling) == 2.0 + 3.0


def test_a_run_prints_every_figure_and_keeps_its_row(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    require_native()
    file = tmp_path / "new" / "rows.jsonl"
    assert attention.main([*TINY.split(), "--head-overlap", "1", "0", "--output", str(file)]) == 0
    said = capsys.readouterr()
    found = json.loads(said.out.splitlines()[-1])
    [kept] = map(json.loads, file.read_text().splitlines())
    assert {name: kept[name] for name in found} == found and kept["versions"]["torch"] == version("torch")
    assert kept["device_name"] and kept["cores"] > 0
    assert found["ratios"].keys() >= RATIOS and min(found["ratios"].values()) > 0.0
    assert found["queries"].keys() == {"wide", "figure3", "wide_heads0", "figure3_heads0"}
    assert found["prefix_read"]["dense_step"] == 1.0 and 0.0 < found["prefix_read"]["losa_step"] < 1.0
    assert found["prefix_read"]["mage_step"] == pytest.approx(64 / 512)
    assert found["ceiling_share"].keys() >= {f"losa_step.{part}" for part in ("attention", "selection", "block+merge")}
    assert "products, GFLOP/s" in said.err and "losa_block" in said.err


def test_several_requests_are_compared_with_one(capsys: pytest.CaptureFixture[str]) -> None:
    require_native()
    steps = ["sdpa_step", "losa_step", "sdpa_step_single", "losa_step_single"]
    assert attention.main([*TINY.split(), "--batch", "3", "--variants", *steps, "--dtype", "bf16"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["ratios"].keys() == {
        "losa_step_vs_sdpa",
        "losa_step_single_vs_sdpa",
        "losa_step_batch_efficiency",
    } | {"sdpa_step_batch_efficiency"}
    ms = found["ms"]
    assert found["ratios"]["losa_step_batch_efficiency"] == pytest.approx(
        3 * ms["losa_step_single"] / ms["losa_step"], rel=0.01
    )
