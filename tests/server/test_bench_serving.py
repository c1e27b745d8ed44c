"""SGLang's own load tester, unchanged and offline, against a server with the bundled model: each backend, each dataset.

Its home is a folder of the test's: it leaves a pickle of the shared prefixes there, which the next tokenizer would be
given.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.server.server_process import ServerProcess

pytestmark = pytest.mark.slow

DATASETS: dict[str, tuple[str, ...]] = {
    "random-ids": (
        *("--num-prompts", "8", "--random-input-len", "64", "--random-output-len", "16"),
        *("--random-range-ratio", "1.0"),
    ),
    "generated-shared-prefix": (
        *("--num-prompts", "8", "--gsp-num-groups", "2", "--gsp-prompts-per-group", "4"),
        *("--gsp-system-prompt-len", "128", "--gsp-question-len", "16", "--gsp-output-len", "16"),
    ),
}


@pytest.fixture(scope="module")
def real(bundled: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder = tmp_path_factory.mktemp("bench")
    with ServerProcess("--model", bundled, "--max-total-tokens", "16384", fake=False, tmp=folder) as server:
        server.wait_ready()
        yield server


@pytest.mark.parametrize("dataset", DATASETS)
@pytest.mark.parametrize("backend", ["sglang", "sglang-oai", "sglang-oai-chat"])
def test_a_load_test_runs_through(real: ServerProcess, tmp_path: Path, backend: str, dataset: str) -> None:
    out = tmp_path / "out.jsonl"
    command = [
        *(sys.executable, "-m", "sglang.bench_serving", "--backend", backend, "--base-url", real.url),
        *("--dataset-name", dataset, *DATASETS[dataset], "--max-concurrency", "4", "--seed", "1"),
        *("--output-file", str(out), "--output-details", "--flush-cache"),
    ]
    environment = {"PATH": os.environ["PATH"], "HF_HUB_OFFLINE": "1", "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    result: dict[str, Any] = json.loads(out.read_text().splitlines()[-1])
    assert result["completed"] == 8, result["errors"]
    assert result["output_lens"] == [16] * 8
    assert result["total_output_tokens"] == 128
    assert all(text for text in result["generated_texts"])
    assert result["mean_ttft_ms"] > 0
