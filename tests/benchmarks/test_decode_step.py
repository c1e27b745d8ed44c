"""The decode-step benchmark: it runs small on a CPU, says what it measured, and refuses what is not there."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks import decode_step

SMALL = "--context 128 --batch 2 --block 4 --steps 3 --blocks 2 --layers 1 --budget 32 --active 1 --threads 1"


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_it_plays_whole_blocks(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    assert decode_step.main([*SMALL.split(), "--output", str(file)]) == 0
    row = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert list(row["methods"]) == ["dense", "quest", "losa"] and row["read_GB_s"] > 0
    for figures in row["methods"].values():
        assert figures["steps"] == 2, "one block counts, of three steps, the first of which is not a later one"
        assert figures["block_ms"] >= figures["step_ms"] > 0 and figures["tokens_per_s"] > 0
    found = {name: each["kv_density"] for name, each in row["methods"].items()}
    assert found["dense"] == 1.0 and found["losa"] <= found["quest"] < 1.0
    # Two requests, one layer, 2 KV heads of 32 numbers: K and V of 132 tokens.
    assert row["methods"]["dense"]["step_kv_MB"] == pytest.approx(2 * 2 * 132 * 2 * 32 * 4 / 1e6, abs=0.01)
    [kept] = [json.loads(line) for line in file.read_text().splitlines()]
    assert row.items() <= kept.items() and kept["versions"]["torch"] and "commit" in kept


def test_the_processors_seconds_and_the_ceiling(capsys: pytest.CaptureFixture[str]) -> None:
    assert decode_step.main([*SMALL.split(), "--methods", "dense", "losa", "--cpu-time"]) == 0
    row = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert row["clock"] == "processor" and set(row["speedup_vs_dense"]) == {"dense", "losa"}
    ceiling, dense = row["ceiling"], row["methods"]["dense"]
    assert 0 < ceiling["step_ms_without_attention"] < dense["step_ms"]
    least = dense["first_step_ms"] + 2 * ceiling["step_ms_without_attention"]
    assert ceiling["block_speedup_at_most"] == pytest.approx(dense["block_ms"] / least, abs=0.01)
    # Two requests of four rows; one layer of 4 heads of 32 numbers over 128 tokens: scores and values, 2 FLOP each.
    assert ceiling["dense_attention_GFLOP"] == round(8 * 128 * 4 * 32 * 4 / 1e9, 2)
    with pytest.raises(SystemExit, match="2"):
        decode_step.main(["--cpu-time", "--threads", "2"])
    assert "--cpu-time: allowed with --threads 1" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        decode_step.main(["--device", "cuda"])
    assert "--device: found 'cuda', but torch sees no GPU" in capsys.readouterr().err
