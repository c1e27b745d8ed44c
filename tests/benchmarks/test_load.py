"""The table of load tests: seeded prose, cells that can be compared, rows, ratios, plots, and one real run."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from benchmarks.load import plots, tables
from benchmarks.load.__main__ import CHECKPOINT, FILES, RESULTS, main, read, write
from benchmarks.load.bench import CallsFailed, run
from benchmarks.load.cells import AXES, BASE, Cell, Stand, growth, workloads
from benchmarks.load.prose import Prose
from losa_runtime.tokenizer import Tokenizer
from losa_server.bench.catalogue import WORKLOADS
from losa_server.bench.running_server import RunningServer
from losa_server.bench.settings import BenchSettings

QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def prose() -> Prose:
    return Prose(Tokenizer(CHECKPOINT))


def test_prose_is_a_function_of_the_seed(prose: Prose) -> None:
    ids = prose.draw(random.Random(1), 700)
    assert len(ids) == 700 and ids == prose.draw(random.Random(1), 700)
    assert ids != prose.draw(random.Random(2), 700)
    assert "secret code of the" in prose.text(random.Random(1), 700)


@pytest.mark.parametrize("count", [0, 1, 37, 699])
def test_a_longer_text_begins_with_the_shorter_one(prose: Prose, count: int) -> None:
    assert prose.draw(random.Random(1), 700)[:count] == prose.draw(random.Random(1), count)


def test_every_workload_is_measured() -> None:
    cells = [cell for stand in workloads() for cell in stand.cells]
    # One document is what its questions share, so "shared-prefix" is in it under several names.
    assert {cell.settings.workload for cell in cells} == set(WORKLOADS)
    assert any(cell.settings.burst_size > 1 for cell in cells) and any(cell.settings.abort_share for cell in cells)
    names = [(cell.labels["name"], cell.labels["method"]) for cell in cells]
    assert len(set(names)) == len(names)


def test_fewer_requests_ask_the_same() -> None:
    few = [cell for stand in workloads(0.25) for cell in stand.cells]
    for cell, small in zip([c for stand in workloads() for c in stand.cells], few, strict=True):
        assert 2 <= small.settings.num_prompts <= cell.settings.num_prompts
        same = cell.settings.model_copy(update={"num_prompts": small.settings.num_prompts})
        assert small.settings == same and small.labels == cell.labels


def test_cells_of_an_axis_differ_in_nothing_else() -> None:
    for axis in AXES:
        cells = [cell for stand in growth() for cell in stand.cells if cell.labels["axis"] == axis]
        assert len({cell.labels["value"] for cell in cells}) >= 5
        assert {cell.labels["method"].partition(":")[0] for cell in cells} >= {"losa"}
        others = [name for name in BASE if name != axis]
        assert len({tuple(cell.labels["at"][name] for name in others) for cell in cells}) == 1
        for cell in cells:
            asked, at = cell.settings, cell.labels["at"]
            assert (asked.prefix_len, asked.concurrency) == (at["context"], at["concurrency"])
            assert at[axis] == cell.labels["value"]
            assert asked.request_methods == (cell.labels["method"],)


def row(axis: str, method: str, speed: float, value: int = 8) -> dict[str, Any]:
    figures = {"output_throughput": 3.0, "tokens_per_cpu_s": speed, "engine_cores": 0.5, "kv_density": 0.1}
    memory = {"kv_bytes_held": 2**20, "engine_rss_bytes": 2**21}
    labels = {"axis": axis, "value": value, "at": {**BASE, axis: value}, "method": method}
    return {**labels, **figures, **memory}


GROWTH = [
    row("context", "dense", 100.0, 1024),
    row("context", "losa:512", 90.0, 1024),
    row("context", "dense", 50.0, 8192),
    row("context", "losa:512", 100.0, 8192),
    *(row(axis, method, 10.0) for axis in ("concurrency", "block_length") for method in ("dense", "losa:512")),
    *(row("budget", f"losa:{budget}", 10.0, budget) for budget in (64, 128)),
]


def test_ratios() -> None:
    found = tables.ratios(GROWTH)
    assert found["context"] == {"1024": 0.9, "8192": 2.0}
    assert set(found) == {"context", "concurrency", "block_length"}


def test_host_share_is_that_of_32_at_once() -> None:
    rows = [{"method": "dense", "host_share": share, "max_concurrency": n} for share, n in ((0.1, 16), (0.2, 32))]
    assert tables.host_share(rows) == {"dense": 0.2}


def test_tables_and_plots(tmp_path: Path) -> None:
    console = Console(record=True, width=200, quiet=False, file=(tmp_path / "out").open("w"))
    tables.growth(GROWTH, console)
    shown = console.export_text()
    assert "2.00" in shown and "8,192" in shown
    plots.growth(GROWTH, tmp_path / "growth.png")
    rows = [{"name": "a", "method": "dense", "latencies": [1.0, 2.0], "ttfts": [0.5, None]}]
    plots.latencies(rows, tmp_path / "latency.png")
    for name in ("growth.png", "latency.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_a_file_is_replaced(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", [{"x": 1}, {"x": 2}])
    write(tmp_path / "a.jsonl", [{"x": 3}])
    assert read(tmp_path / "a.jsonl") == [{"x": 3}]
    assert list(tmp_path.iterdir()) == [tmp_path / "a.jsonl"]

    def breaks_off() -> Iterator[dict[str, Any]]:
        yield {"x": 4}
        raise OSError

    with pytest.raises(OSError):
        write(tmp_path / "a.jsonl", breaks_off())
    assert read(tmp_path / "a.jsonl") == [{"x": 3}] and read(tmp_path / "a.new") == [{"x": 4}]


def test_growth_has_servers_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--url", "http://127.0.0.1:9"])
    assert "--url: growth needs servers of its own" in capsys.readouterr().err
    assert main(["workloads", "--url", "http://127.0.0.1:9", "--folder", str(tmp_path)]) == 1


def test_nothing_to_report_on_is_said(tmp_path: Path) -> None:
    assert main(["growth", "--report-only", "--folder", str(tmp_path)]) == 1


def test_the_recorded_rows_can_be_drawn_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in FILES.values():
        (tmp_path / name).write_bytes((RESULTS / name).read_bytes())
    assert main(["--report-only", "--folder", str(tmp_path)]) == 0
    assert set(json.loads(capsys.readouterr().out)) == {"host_share_at_32", "losa_over_dense"}


@pytest.mark.slow
def test_a_real_run(tiny_checkpoint: Path) -> None:
    asked: dict[str, Any] = {"num_prompts": 3, "random_output_len": 16, "random_input_len": 8, "warmup_requests": 0}
    base = BenchSettings(workload="shared-prefix", prefix_groups=1, prefix_len=64, **asked)
    cells = [
        Cell({"name": method}, base.model_copy(update={"request_methods": (method,)}), primed=True)
        for method in ("dense", "losa:32")
    ]
    cells.append(Cell({"name": "left"}, base.model_copy(update={"abort_share": 1.0, "random_output_len": 160})))
    *rows, left = run(str(tiny_checkpoint), [Stand(("--max-total-tokens", "4096"), tuple(cells))], QUIET)
    assert [row["name"] for row in rows] == ["dense", "losa:32"]
    assert len(left["latencies"]) == left["completed"] < 3
    assert all(len(row["latencies"]) == len(row["ttfts"]) == 3 for row in rows)
    for found in rows:
        assert (found["completed"], found["total_output_tokens"]) == (3, 48)
        assert 0 < found["host_share"] < 1 and found["kv_bytes_held"] > 0 and found["commit"]
        assert found["cache_hit_rate"] > 0.8  # the document was read before
    assert rows[0]["kv_density"] == 1.0 > rows[1]["kv_density"]
    with RunningServer(str(tiny_checkpoint), ("--max-total-tokens", "4096")) as server:
        [again] = run(str(tiny_checkpoint), [Stand((), tuple(cells[:1]))], QUIET, server.url)
    assert again["completed"] == 3
    refused = base.model_copy(update={"prefix_len": 8192})
    with pytest.raises(CallsFailed, match="calls failed: 400"):
        list(run(str(tiny_checkpoint), [Stand((), (Cell({"name": "too long"}, refused),))], QUIET))
