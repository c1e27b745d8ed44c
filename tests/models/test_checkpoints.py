"""Reading good folders: configuration in all its spellings, shards, dtypes, the random checkpoint and its command."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from losa_runtime.core.config import RopeScaling
from losa_runtime.core.errors import CheckpointError, ConfigError
from losa_runtime.core.model_config import ModelConfig
from losa_runtime.models.model import BlockDiffusionModel, load_model
from losa_runtime.models.presets import PRESETS
from losa_runtime.models.random_checkpoint import write_random_checkpoint
from losa_runtime.tokenizer import Tokenizer
from losa_server.commands import make_checkpoint

SDAR_4B: dict[str, Any] = {
    "architectures": ["SDARForCausalLM"],
    "attention_bias": False,
    "eos_token_id": 151643,
    "fuse_cross_entropy": True,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "max_position_embeddings": 32768,
    "model_type": "sdar",
    "num_attention_heads": 32,
    "num_hidden_layers": 36,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": False,
    "use_sliding_window": False,
    "vocab_size": 151936,
}


def read(folder: Path, raw: dict[str, Any], **options: Any) -> ModelConfig:
    (folder / "config.json").write_text(json.dumps(raw))
    return ModelConfig.from_folder(folder, **options)


def load(folder: Path, dtype: torch.dtype = torch.float32) -> BlockDiffusionModel:
    return load_model(folder, ModelConfig.from_folder(folder), dtype, "cpu")


def test_released_config_without_block_size_and_mask(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [151645, 151643], "pad_token_id": 151643}')
    config = read(tmp_path, SDAR_4B)
    assert (config.block_length, config.mask_token_id) == (4, 151669)
    assert config.eos_token_ids == (151645, 151643)
    assert config.pad_token_id == 151643
    assert config.dtype == "bfloat16"
    assert config.max_context == 32768
    config = read(tmp_path, {**SDAR_4B, "block_size": 8}, block_length=32, mask_token_id=7)
    assert (config.block_length, config.mask_token_id) == (32, 7)


def test_rope_in_old_and_new_spelling(tmp_path: Path) -> None:
    yarn: dict[str, Any] = {"factor": 4.0, "original_max_position_embeddings": 16384}
    old = read(tmp_path, {**SDAR_4B, "rope_scaling": {"type": "yarn", **yarn}})
    assert old.rope_scaling == RopeScaling(kind="yarn", **yarn)
    assert old.max_context == 65536
    new = {k: v for k, v in SDAR_4B.items() if k not in ("rope_theta", "rope_scaling")}
    assert read(tmp_path, {**new, "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6, **yarn}}) == old
    nested = {"full_attention": {"rope_type": "yarn", "rope_theta": 1e6, "truncate": True, **yarn}}
    assert read(tmp_path, {**new, "rope_parameters": nested}) == old
    linear = read(tmp_path, SDAR_4B, rope_scaling=RopeScaling(kind="linear", factor=1.5))
    assert linear.max_context == 49152


def test_config_is_frozen(tmp_path: Path) -> None:
    config = read(tmp_path, SDAR_4B)
    with pytest.raises(ValueError, match="frozen"):
        config.vocab_size = 1


def test_sharded_equals_single(tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path / "one", seed=5)
    write_random_checkpoint(tmp_path / "many", seed=5, max_shard_bytes=70_000)
    assert len(list((tmp_path / "many").glob("model-*.safetensors"))) > 3
    one, many = load(tmp_path / "one").state_dict(), load(tmp_path / "many").state_dict()
    assert one.keys() == many.keys()
    assert all(torch.equal(one[name], many[name]) for name in one)


def test_seed_and_dtype(tmp_path: Path) -> None:
    for seed in (0, 1):
        write_random_checkpoint(tmp_path / str(seed), seed=seed, dtype="bfloat16")
    same, other = load(tmp_path / "0", torch.bfloat16), load(tmp_path / "1", torch.bfloat16)
    assert same.config.dtype == "bfloat16"
    assert all(p.dtype == torch.bfloat16 for p in same.parameters())
    assert all(b.dtype == torch.float32 for b in same.buffers())
    assert not torch.equal(next(same.parameters()), next(other.parameters()))
    wide = load(tmp_path / "0")
    assert all(torch.equal(a.float(), b) for a, b in zip(same.parameters(), wide.parameters(), strict=True))


def test_weights_are_copies_of_the_file(tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path)
    model = load(tmp_path)
    before = {name: p.clone() for name, p in model.named_parameters()}
    size = (tmp_path / "model.safetensors").stat().st_size
    with (tmp_path / "model.safetensors").open("r+b") as file:
        file.write(b"\0" * size)
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())


def test_random_checkpoint_round_trip(tmp_path: Path) -> None:
    start = time.perf_counter()
    config = write_random_checkpoint(tmp_path, num_hidden_layers=3, block_size=4)
    assert time.perf_counter() - start < 2
    assert ModelConfig.from_folder(tmp_path) == config
    assert (config.num_layers, config.block_length, config.eos_token_ids) == (3, 4, (258, 256))
    tokenizer = Tokenizer(tmp_path)
    assert tokenizer.vocab_size == 260 <= config.vocab_size
    assert (tokenizer.eos_token_id, tokenizer.mask_token_id) == (258, config.mask_token_id)
    assert len(load(tmp_path).model.layers) == 3  # type: ignore[union-attr,arg-type]


def test_random_checkpoint_refusals(tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path)
    with pytest.raises(ConfigError, match="found a checkpoint"):
        write_random_checkpoint(tmp_path)
    write_random_checkpoint(tmp_path, overwrite=True)
    with pytest.raises(ConfigError, match="preset: found 'huge', allowed: tiny"):
        write_random_checkpoint(tmp_path / "b", "huge")
    with pytest.raises(ConfigError, match="num_layers: found 3, allowed: one of"):
        write_random_checkpoint(tmp_path / "b", num_layers=3)
    with pytest.raises(ConfigError, match="vocab_size: found 200, allowed: at least 260"):
        write_random_checkpoint(tmp_path / "b", vocab_size=200)
    with pytest.raises(CheckpointError, match="num_key_value_heads: found 3"):
        write_random_checkpoint(tmp_path / "b", num_key_value_heads=3)
    assert not (tmp_path / "b").exists()
    with pytest.raises(CheckpointError, match="head_dim: found 7"):
        write_random_checkpoint(tmp_path, head_dim=7, overwrite=True)
    load(tmp_path)  # a refusal leaves what was there


def test_presets_are_complete() -> None:
    assert list(PRESETS) == ["tiny", "0.6b", "1.7b", "4b", "8b", "30b-a3b", "llada2-mini"]
    assert len({frozenset(fields) for fields in list(PRESETS.values())[:5]}) == 1


def test_progress_bar_only_when_asked(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    config = write_random_checkpoint(tmp_path)
    load_model(tmp_path, config, torch.float32, "cpu", show_progress=False)
    assert capfd.readouterr() == ("", "")
    load_model(tmp_path, config, torch.float32, "cpu", show_progress=True)
    out, err = capfd.readouterr()
    assert out == ""
    assert "loading weights" in err
    write_random_checkpoint(tmp_path, overwrite=True, show_progress=True)
    assert "writing weights" in capfd.readouterr().err


def command(*words: str) -> int:
    parser = argparse.ArgumentParser()
    make_checkpoint.add_parser(parser.add_subparsers())
    args = parser.parse_args(["make-checkpoint", *words])
    result: int = args.run(args)
    return result


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "made"
    assert command(str(folder), "--layers", "1", "--tie-embeddings", "--block-length", "8", "--dtype", "bfloat16") == 0
    assert str(folder) in capsys.readouterr().out
    config = ModelConfig.from_folder(folder)
    assert (config.num_layers, config.tie_word_embeddings, config.block_length) == (1, True, 8)
    assert command(str(folder)) == 2
    assert "found a checkpoint" in capsys.readouterr().err
    assert command(str(folder), "--force", "--head-dim", "7") == 2
    assert "head_dim: found 7" in capsys.readouterr().err
    assert command(str(folder), "--force", "--max-shard-mib", "0") == 2


def test_loading_and_running_needs_no_compiler(tiny_checkpoint: Path) -> None:
    """torch loads its compiler, which takes seconds, for what one would not expect, e.g. random numbers on `meta`."""
    code = (
        "import sys; from losa_runtime import LLM, SamplingParams; llm = LLM(model=sys.argv[1], max_total_tokens=1024);"
        "llm.generate([[70, 71, 72]], SamplingParams(max_new_tokens=4));"
        "sys.exit(' '.join(m for m in sys.modules if m.startswith(('torch._inductor', 'torch._dynamo'))))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tiny_checkpoint)], capture_output=True, text=True)
    assert done.stderr.strip() == ""
