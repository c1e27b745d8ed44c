"""The evidence for `--sparse-min-context auto`: it runs small and says what it saw."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks import min_context


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_it_compares_the_rule_with_both_sides(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "rows.jsonl"
    arguments = ["--model", str(tiny_checkpoint), "--contexts", "96", "160", "--output", "32", "--rounds", "1"]
    arguments += ["--budget", "32", "--threads", "1", "--cpu-time", "--results", str(file)]
    assert min_context.main(arguments) == 0
    row = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [one["context"] for one in row["rows"]] == [96, 160]
    for one in row["rows"]:
        assert one["rule_over_dense"] == pytest.approx(one["dense_tokens_per_s"] / one["rule_tokens_per_s"], rel=0.02)
        least = row["sparse_from"]
        if least is None or not one["context"] < least < one["context"] + 32:  # else the blocks differ
            assert one["rule_chose"] == ("losa" if least is not None and least <= one["context"] else "dense")
    assert row["worst"] == max(one["rule_over_dense"] for one in row["rows"])
    [kept] = [json.loads(line) for line in file.read_text().splitlines()]
    assert row.items() <= kept.items() and "commit" in kept


def test_the_processors_seconds_need_one_thread(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        min_context.main(["--cpu-time", "--threads", "2"])
    assert "--cpu-time: allowed with --threads 1" in capsys.readouterr().err
