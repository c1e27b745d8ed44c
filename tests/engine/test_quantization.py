"""An engine with quantized layers: its facts, its bits in deterministic mode, and a model that still answers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.tiny_model.evaluate import prompts
from losa_runtime import LLM, SamplingParams
from losa_runtime.core.sampling_params import DiffusionParams
from tests.engine.recording import logits_of
from tests.engine.test_exact import prompt


def test_facts(bundled_checkpoint: Path) -> None:
    plain, small = (
        LLM(model=str(bundled_checkpoint), quantization=kind, max_total_tokens=1024).engine.parts.info()
        for kind in (None, "int8")
    )
    assert plain["quantization"] is None and small["quantization"] == "int8"
    assert plain["weight_bytes"] == plain["weight_bytes_unquantized"] == small["weight_bytes_unquantized"]
    assert small["weight_bytes"] < 0.5 * plain["weight_bytes"]  # type: ignore[operator]
    assert {name: small[name] for name in ("parameters", "dtype")} == {
        name: plain[name] for name in ("parameters", "dtype")
    }


@pytest.mark.parametrize("kind", ["int8", "fp8"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_deterministic_mode_keeps_its_promise(tiny_checkpoint: Path, kind: str, dtype: str) -> None:
    """Logits of a request have the same bits alone, in company, in other chunks, and on a cache hit."""
    options: dict[str, Any] = {"quantization": kind, "dtype": dtype, "deterministic": True, "max_total_tokens": 4096}
    custom = DiffusionParams(
        sparse_method="losa", token_budget=32, algorithm="low_confidence_static", denoising_steps=4
    )
    shared = prompt(48, seed=0)
    asked = [
        (
            shared + prompt(n, seed=n),
            SamplingParams(temperature=0.7, sampling_seed=n, max_new_tokens=20, custom_params=custom),
        )
        for n in (3, 100, 333)
    ]
    alone = LLM(model=str(tiny_checkpoint), max_running_requests=1, disable_radix_cache=True, **options)
    wanted = logits_of(alone, asked)[0]
    company = LLM(model=str(tiny_checkpoint), chunked_prefill_size=80, **options)
    for _ in ("cold", "warm"):
        found = logits_of(company, asked)[0]
        assert found.keys() == wanted.keys()
        assert all(torch.equal(logits, wanted[row]) for row, logits in found.items())


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_the_bundled_model_still_answers(bundled_checkpoint: Path, kind: str) -> None:
    asked, questions = prompts("multi_value", 512, 8)
    llm = LLM(model=str(bundled_checkpoint), quantization=kind, sparse_method="losa", token_budget=128)
    answers = llm.generate(asked, SamplingParams(temperature=0, max_new_tokens=16))
    right = sum(answer.text.strip() == question.answer for answer, question in zip(answers, questions, strict=True))
    assert right >= 7


def test_torchao_is_imported_only_when_asked_for_and_says_nothing(tiny_checkpoint: Path) -> None:
    """Its own warnings are of GPU libraries that are not used."""
    program = (
        "import sys; from losa_runtime import LLM\n"
        f"LLM(model={str(tiny_checkpoint)!r}, max_total_tokens=512, show_progress=False)\n"
        "assert 'torchao' not in sys.modules\n"
        f"LLM(model={str(tiny_checkpoint)!r}, max_total_tokens=512, show_progress=False, quantization='fp8')\n"
        "assert 'torchao' in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
