"""The benchmark of 8-bit weights, small: every variant is measured, and the figures are of what was asked for."""

from __future__ import annotations

import json

import pytest

from benchmarks import quantization


def test_bundled(capsys: pytest.CaptureFixture[str]) -> None:
    words = "--parts bundled --context 512 --samples 1 --tasks single --logit-samples 1"
    words += " --rounds 1 --requests 1 --output-tokens 16"
    assert quantization.main(words.split()) == 0
    captured = capsys.readouterr()
    (row,) = json.loads(captured.out.splitlines()[-1])
    variants = row["variants"]
    assert list(variants) == ["none", "int8", "fp8"]
    assert variants["none"]["logits"] == variants["none"]["logits"] | {"mean_error": 0.0, "kl": 0.0, "rows": 16}
    for kind in ("int8", "fp8"):
        assert variants[kind]["weight_bytes"] < variants["none"]["weight_bytes"]
        assert 0 < variants[kind]["logits"]["mean_error"] < variants[kind]["logits"]["max_error"]
        assert variants[kind]["tokens_per_cpu_s"] > 0
    assert "right, single" in captured.err


@pytest.mark.slow
def test_large(capsys: pytest.CaptureFixture[str]) -> None:
    words = "--parts large --preset tiny --dtypes bfloat16 --rounds 1"
    assert quantization.main(words.split()) == 0
    (row,) = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [(found["kind"], found["dtype"]) for found in row["variants"]] == [
        (kind, "bfloat16") for kind in ("none", "int8", "fp8")
    ]
    assert all(found["peak_bytes"] >= found["held_bytes"] > found["weight_bytes"] > 0 for found in row["variants"])
    assert len({found["weight_bytes"] for found in row["variants"]}) == 3
