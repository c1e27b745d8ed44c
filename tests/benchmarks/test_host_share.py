"""The share of a round outside the model: measured over rounds in which all requests run."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks import host_share


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("method", ["dense", "losa"])
def test_the_parts_of_a_round_add_up(
    tiny_checkpoint: Path, tmp_path: Path, method: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "rows.jsonl"
    arguments = ["--model", str(tiny_checkpoint), "--requests", "3", "--context", "300", "--rounds", "6"]
    arguments += ["--method", method, "--budget", "32", "--results", str(file)]
    assert host_share.main(arguments) == 0
    row = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert row["rounds"] == 6 and 0 < row["host_share"] < 1
    assert row["layers_ms"] > 0 and row["vocabulary_ms"] > 0 and row["rest_ms"] > 0
    parts = row["layers_ms"] + row["vocabulary_ms"] + row["rest_ms"]
    assert parts == pytest.approx(row["round_ms"], abs=0.01)
    assert row["host_share"] == pytest.approx(row["rest_ms"] / row["round_ms"], abs=0.01)
    assert "commit" in json.loads(file.read_text())
    assert host_share.main([*arguments[:-2], "--profile", "5"]) == 0
    assert "due to restriction <5>" in capsys.readouterr().err
