"""A checkpoint folder is data: nothing in it is ever run, whatever its files are called and its configs say."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from losa_runtime.core.errors import CheckpointError
from losa_runtime.core.model_config import ModelConfig
from losa_runtime.models.model import load_model
from tests.server.server_process import free_port

ROOT = Path(__file__).parents[2]
CODE = "import pathlib; pathlib.Path({canary!r}).write_text('ran')\nclass Evil: pass\n"
AUTO_MAP = {
    "AutoConfig": "configuration_evil.Evil",
    "AutoModel": "modeling_evil.Evil",
    "AutoModelForCausalLM": "modeling_evil.Evil",
    "AutoTokenizer": ["tokenization_evil.Evil", "tokenization_evil.Evil"],
}
# Files that some library or the interpreter itself would run, were it made to look here.
SCRIPTS = (
    "configuration_evil.py", "modeling_evil.py", "tokenization_evil.py", "__init__.py", "sitecustomize.py",
    "usercustomize.py", "conftest.py", "torch.py", "numpy.py", "zmq.py", "json.py", "losa_kernels.py", "safetensors.py",
)  # fmt: skip


class Bomb:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (self.path,)


def change(file: Path, **fields: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


@pytest.fixture
def hostile(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A loadable folder full of code; `canary` beside it shows whether any of it ran."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_checkpoint, folder)
    canary = str(tmp_path / "canary")
    for name in SCRIPTS:
        (folder / name).write_text(CODE.format(canary=canary))
    for name in ("pytorch_model.bin", "optimizer.pt", "training_args.bin", "model.pth"):
        (folder / name).write_bytes(pickle.dumps(Bomb(canary)))
    nested = {"auto_map": AUTO_MAP, "trust_remote_code": True}
    change(folder / "config.json", **nested, text_config=nested, vision_config=nested)
    change(folder / "tokenizer_config.json", auto_map=AUTO_MAP, tokenizer_class="tokenization_evil.Evil")
    (folder / "generation_config.json").write_text(json.dumps({"custom_generate": "modeling_evil", **nested}))
    return folder


def losa(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """The command as a user has it, called from inside the folder."""
    environment = {**os.environ, "PYTHONPATH": ":".join(str(ROOT / p) for p in ("", "kernels", "server"))}
    code = "import sys; from losa_server.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-P", "-c", code, *words]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_a_folder_full_of_code_is_loaded_as_data(hostile: Path) -> None:
    done = losa(hostile, "generate", "--model-path", ".", "--prompt", "The fox", "--max-new-tokens", "4")
    assert done.returncode == 0, done.stderr
    assert not (hostile.parent / "canary").exists()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
def test_pickled_weights_are_never_opened(hostile: Path, name: str) -> None:
    (hostile / "model.safetensors").unlink()
    (hostile / "optimizer.pt").replace(hostile / name)
    with pytest.raises(CheckpointError, match=r"safetensors"):
        load_model(hostile, ModelConfig.from_folder(hostile), torch.float32, "cpu")
    assert not (hostile.parent / "canary").exists()


@pytest.mark.slow
def test_the_server_and_its_processes_run_nothing_of_the_folder_they_are_started_in(hostile: Path) -> None:
    """The engine, template and compiler processes are started with -m, which looks in the current folder first."""
    code = (
        "import os, sys, signal, threading, time, httpx\n"
        "from losa_server import launch\n"
        "from losa_server.cli import main\n"
        "port = sys.argv[1]\n"
        "def visit():\n"
        "    for _ in range(1200):\n"
        "        try:\n"
        "            if httpx.get(f'http://127.0.0.1:{port}/health').status_code == 200: break\n"
        "        except httpx.TransportError: pass\n"
        "        time.sleep(0.1)\n"
        "    body = {'text': 'a', 'sampling_params': {'max_new_tokens': 4, 'temperature': 0, 'regex': '[ab]+'}}\n"
        "    print('answer', httpx.post(f'http://127.0.0.1:{port}/generate', json=body, timeout=100).status_code)\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "threading.Thread(target=visit, daemon=True).start()\n"
        "sys.exit(main(['serve', '--model', '.', '--port', port, '--max-total-tokens', '4096']))\n"
    )
    environment = {**os.environ, "PYTHONPATH": ":".join(str(ROOT / p) for p in ("", "kernels", "server"))}
    command = [sys.executable, "-P", "-c", code, str(free_port())]
    done = subprocess.run(
        command, cwd=hostile, env=environment, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr + done.stdout
    assert "answer 200" in done.stdout
    assert not (hostile.parent / "canary").exists()
