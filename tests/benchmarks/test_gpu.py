"""What is measured on a GPU: every run is understood by its program, and what does not fit is left out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import attention, decode_step, gpu
from benchmarks.attention_variants import Work, variants
from benchmarks.device import GIB

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


def test_every_run_is_understood() -> None:
    seen = set()
    for run in gpu.runs():
        there = ["cpu" if word == "cuda" else word for word in run.arguments]
        if run.main is attention.main:
            args = attention._arguments(there)
            seen.add((args.context, args.batch, args.block))
        else:
            args = decode_step._parser().parse_args(there)
            assert args.preset == "8b" and {"dense", "losa"} <= set(args.methods)
        assert run.need > 0
    assert {(context, batch, 16) for context in gpu.CONTEXTS for batch in gpu.BATCHES} <= seen
    assert {block for _, _, block in seen} == {16, 32}


@no_gpu
@pytest.mark.parametrize(
    "call",
    [
        lambda: gpu.main([]),
        lambda: attention.main(["--device", "cuda"]),
        lambda: decode_step.main(["--device", "cuda"]),
    ],
)
def test_no_gpu_is_said(call: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        call()
    assert "found 'cuda', but torch sees no GPU" in capsys.readouterr().err


def test_what_does_not_fit_is_skipped(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[tuple[str, ...]] = []

    def run(arguments: Sequence[str]) -> int:
        asked.append(tuple(arguments))
        return 0

    planned = [gpu.Run(run, (name,), f"{name}.jsonl", need * GIB) for name, need in (("small", 8), ("large", 60))]
    monkeypatch.setattr(gpu, "runs", lambda: iter(planned))
    monkeypatch.setattr(gpu, "chosen_device", lambda parser, name: torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (16 * GIB, 80 * GIB))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    assert gpu.main(["--folder", str(tmp_path)]) == 0
    assert asked == [("small", "--output", str(tmp_path / "small.jsonl"))]
    assert gpu.main(["--seconds", "1"]) == 1 and len(asked) == 1
    said = " ".join(capsys.readouterr().err.split())
    assert "60 GiB needed, 16 free" in said and "no time left" in said


@pytest.mark.parametrize(
    ("base", "first"), [("sdpa", "sdpa_step"), ("flashinfer", "flashinfer_step"), ("dense", "dense_step")]
)
def test_all_is_compared_with_the_yardstick(base: str, first: str) -> None:
    table = variants(["wide"], 4, base)
    assert table[0].name == first and f"{base}_block" in {v.name for v in table if v.work is Work.BLOCK}
    assert {v.backend for v in table} == ({None, "flashinfer"} if base == "flashinfer" else {None})
    assert len({v.name for v in table}) == len(table)


def test_variants_that_are_not_there_are_refused() -> None:
    with pytest.raises(SystemExit, match="found fast_step, of which there is none"):
        attention.main(["--variants", "fast_step"])
