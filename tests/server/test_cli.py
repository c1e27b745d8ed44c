"""The `losa` command: mistakes become one line that says what was meant, help names every option."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

import losa_runtime
from losa_server.cli import main as losa

SERVE = ["serve", "--model-path", "m"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([*SERVE, "--max-model-len", "5"], "--max-model-len (here: --context-length)"),
        ([*SERVE, "--gpu-memory-utilization=0.5"], "--gpu-memory-utilization (here: --mem-fraction-static)"),
        ([*SERVE, "--enforce-eager"], "--enforce-eager (not an option here)"),
        ([*SERVE, "--tokn-budget", "5"], "--tokn-budget (did you mean --token-budget?)"),
        ([*SERVE, "--max-running-request", "5"], "(did you mean --max-running-requests?)"),
        ([*SERVE, "--zzz"], "unknown argument --zzz"),
        ([*SERVE, "stray"], "unknown argument stray"),
        (["srve"], "there is no command srve (did you mean serve?)"),
        ([*SERVE, "--page-size"], "--page-size: expected one argument"),
        ([*SERVE, "--rope-scaling", "{"], "--rope-scaling: found '{': not JSON"),
        ([*SERVE, "--page-size", "0"], "--page-size: found '0': Input should be greater than 0"),
        ([*SERVE, "--page-size", "x"], "--page-size: found 'x': Input should be a valid integer"),
        ([*SERVE, "--dtype", "int4"], "--dtype: found 'int4': Input should be 'auto', 'float32'"),
        ([*SERVE, "--port", "70000"], "--port: found '70000'"),
        (["serve"], "--model-path is required (or LOSA_MODEL_PATH, or model_path in a --config file)"),
        (["generate"], "--model-path is required"),
    ],
)
def test_mistakes_are_explained(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        sys.exit(losa(words))
    assert caught.value.code == 2
    assert said in capsys.readouterr().err


def test_a_value_of_an_unknown_flag_is_not_reported_too(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        losa([*SERVE, "--max-num-seqs", "5", "--zzz"])
    assert capsys.readouterr().err.count("unknown argument") == 2


@pytest.mark.parametrize("command", ["serve", "generate", "chat", "bench", "env", "make-checkpoint"])
def test_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        losa([command, "--help"])
    assert caught.value.code == 0
    assert "usage: losa" in capsys.readouterr().out


def test_nothing_is_answered_with_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert losa([]) == 2
    shown = capsys.readouterr().err
    assert all(command in shown for command in ("serve", "generate", "chat", "bench", "env", "make-checkpoint"))


def test_help_is_grouped_and_tells_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        losa(["serve", "--help"])
    out = " ".join(capsys.readouterr().out.split())
    assert "memory and batching: --kv-cache-dtype" in out
    assert "--page-size N tokens per page (default: 16)" in out
    assert "--no-deterministic" not in out


def test_env_tells_what_is_here(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOSA_API_KEY", "hush")
    assert losa(["env", "--json"]) == 0
    text = capsys.readouterr().out
    facts = json.loads(text)
    assert facts["software"]["torch"].startswith("2.")
    assert facts["software"]["losa-runtime"] == losa_runtime.__version__
    assert facts["settings"]["LOSA_ variables"] == "LOSA_API_KEY"
    assert "hush" not in text
    assert losa(["env"]) == 0
    assert "CPU kernels" in capsys.readouterr().out


def test_env_says_why_kernels_cannot_be_used(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"not a library")
    for place, why in ((tmp_path / "lib.so", "lib.so was not built"), (broken, f"{broken} cannot be loaded")):
        monkeypatch.setenv("LOSA_KERNELS", str(place))
        assert losa(["env", "--json"]) == 0
        assert f"not usable: {why}" in json.loads(capsys.readouterr().out)["kernels"]["CPU kernels"]
