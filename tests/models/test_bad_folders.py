"""Every folder that cannot be loaded is refused before any work, with an answer that names what is wrong."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from losa_runtime.assembly import assemble
from losa_runtime.core.architectures import REFUSED_ARCHITECTURES, SUPPORTED
from losa_runtime.core.config import EngineConfig
from losa_runtime.core.errors import CheckpointError
from losa_runtime.core.model_config import ModelConfig
from losa_runtime.models.locate import locate_checkpoint
from losa_runtime.models.model import FAMILIES, family_class, load_model
from losa_runtime.models.random_checkpoint import write_random_checkpoint

Tensors = dict[str, torch.Tensor]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_random_checkpoint(tmp_path)
    return tmp_path


def load(folder: Path) -> None:
    load_model(folder, ModelConfig.from_folder(folder), torch.float32, "cpu")


def edit(folder: Path, **fields: Any) -> None:
    """Change config.json; a value of `...` removes the field."""
    raw = json.loads((folder / "config.json").read_text()) | fields
    (folder / "config.json").write_text(json.dumps({k: v for k, v in raw.items() if v is not ...}))


def rewrite(folder: Path, change: Callable[[Tensors], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


BAD_FIELDS: list[tuple[dict[str, Any], str]] = [
    ({"vocab_size": ...}, "vocab_size: found nothing"),
    ({"head_dim": ...}, "head_dim: found nothing"),
    ({"num_hidden_layers": ...}, "num_hidden_layers: found nothing"),
    ({"rope_theta": ...}, "rope_theta: found nothing"),
    ({"hidden_size": "64"}, "hidden_size: found '64', allowed: a valid integer"),
    ({"num_attention_heads": 4.5}, "num_attention_heads: found 4.5"),
    ({"rms_norm_eps": 0}, "rms_norm_eps: found 0"),
    ({"tie_word_embeddings": "yes"}, "tie_word_embeddings: found 'yes'"),
    ({"num_key_value_heads": 3}, "num_key_value_heads: found 3, allowed: a divisor of num_attention_heads = 4"),
    ({"head_dim": 33}, "head_dim: found 33, allowed: a multiple of 2"),
    ({"mask_token_id": 320}, "mask_token_id: found 320, allowed: ids inside the vocabulary, 0 .. 319"),
    ({"mask_token_id": ...}, "mask_token_id: found 151669.*give the option"),
    ({"eos_token_id": [2, 999]}, "eos_token_id: found .*999"),
    ({"eos_token_id": "2"}, "eos_token_id: found '2', allowed: an integer or a list of integers"),
    ({"pad_token_id": 5000}, "pad_token_id: found 5000, allowed: ids inside the vocabulary"),
    ({"dtype": "int8"}, "dtype: found 'int8'"),
    ({"hidden_act": "gelu"}, "hidden_act: found 'gelu', allowed: \"silu\""),
    ({"attention_bias": True}, "attention_bias: found True, allowed: false"),
    ({"use_sliding_window": True}, "use_sliding_window: found True"),
    ({"quantization_config": {"bits": 4}}, "quantization_config: found .* allowed: none"),
    ({"layer_types": ["sliding_attention"] * 2}, "layer_types: found .* full_attention"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor: found 0.5"),
    ({"block_size": 16, "block_length": 8}, "block_length: found 8, allowed: the same as block_size = 16"),
    ({"block_size": 0}, "block_size: found 0"),
    ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type: found 'dynamic', allowed: default, linear or"),
    ({"rope_scaling": {"type": "linear"}}, "rope_scaling.factor: found None, allowed: a value"),
    ({"rope_scaling": {"type": "linear", "factor": 0.5}}, "rope_scaling.factor: found 0.5"),
    ({"rope_scaling": {"type": "yarn", "factor": 2.0, "mscale": 0.7}}, "rope_scaling.mscale: found 0.7"),
    ({"rope_scaling": {"type": "yarn", "factor": 2.0, "truncate": False}}, "rope_scaling.truncate: found False"),
    ({"rope_scaling": {"type": "yarn", "rope_type": "linear", "factor": 2.0}}, "rope_type and type that agree"),
    ({"rope_scaling": "yarn"}, "rope_scaling: found 'yarn', allowed: an object or null"),
    ({"rope_parameters": {"rope_theta": 5.0, "rope_type": "default"}}, "rope_theta: found 10000.0, allowed: the same"),
    ({"architectures": []}, "architectures: found"),
    ({"architectures": ["LLaDAModelLM"]}, "LLaDAModelLM is a full-attention diffusion model.*no exact prefix cache"),
    ({"architectures": ["DreamModel"]}, "DreamModel is a full-attention diffusion model"),
    ({"architectures": ["Qwen3ForCausalLM"]}, "Qwen3ForCausalLM is an autoregressive model"),
    ({"architectures": ["NovelLM"]}, "NovelLM is not a model family.*Allowed: SDARForCausalLM"),
]


@pytest.mark.parametrize(("fields", "answer"), BAD_FIELDS, ids=[a[:40] for _, a in BAD_FIELDS])
def test_bad_config(folder: Path, fields: dict[str, Any], answer: str) -> None:
    (folder / "generation_config.json").unlink()
    edit(folder, **fields)
    with pytest.raises(CheckpointError, match=answer) as caught:
        ModelConfig.from_folder(folder)
    assert str(folder / "config.json") in str(caught.value)


def test_bad_option_is_named_as_an_option(folder: Path) -> None:
    with pytest.raises(CheckpointError, match="option mask_token_id: found 400"):
        ModelConfig.from_folder(folder, mask_token_id=400)


def test_bad_ids_of_the_generation_config_are_named_with_it(folder: Path) -> None:
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 4000]}')
    with pytest.raises(CheckpointError, match=r"or generation_config\.json: eos_token_id: found .*4000"):
        ModelConfig.from_folder(folder)


@pytest.mark.parametrize(
    ("content", "answer"), [(None, "cannot be read"), ("{", "is not JSON"), ("[]", "found a JSON list")]
)
def test_unreadable_config(folder: Path, content: str | None, answer: str) -> None:
    (folder / "config.json").unlink()
    if content is not None:
        (folder / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=answer):
        ModelConfig.from_folder(folder)


def _drop(tensors: Tensors) -> None:
    del tensors["model.layers.1.self_attn.q_norm.weight"]


def _add(tensors: Tensors) -> None:
    tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(128)


def _reshape(tensors: Tensors) -> None:
    tensors["model.norm.weight"] = torch.ones(65)


def _quantise(tensors: Tensors) -> None:
    tensors["lm_head.weight"] = torch.zeros(320, 64, dtype=torch.int8)


def _drop_and_add(tensors: Tensors) -> None:
    _drop(tensors)
    _add(tensors)


def _drop_most(tensors: Tensors) -> None:
    for name in list(tensors)[1:]:
        del tensors[name]


@pytest.mark.parametrize(
    ("change", "answer"),
    [
        (_drop, "missing model.layers.1.self_attn.q_norm.weight [32]"),
        (_add, "unexpected model.layers.0.self_attn.q_proj.bias [128]"),
        (_reshape, "model.norm.weight: expected [64], found [65]"),
        (_quantise, "lm_head.weight: expected one of BF16, F16, F32, F64, found I8"),
        (_drop_and_add, "[32]; unexpected model.layers.0"),
        (_drop_most, "and 16 more"),
    ],
)
def test_tensors_that_do_not_fit(folder: Path, change: Callable[[Tensors], None], answer: str) -> None:
    rewrite(folder, change)
    with pytest.raises(CheckpointError, match=re.escape(answer)):
        load(folder)


def test_tied_head_that_contradicts_the_embedding(folder: Path) -> None:
    edit(folder, tie_word_embeddings=True)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"):
        load(folder)
    rewrite(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    load(folder)


def test_only_pickles(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"found pytorch_model.bin but no safetensors; pickled weights run code"):
        load(folder)


def test_no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="found no weights"):
        load(folder)


def test_broken_weights(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError, match="is not a readable safetensors file"):
        load(folder)


@pytest.mark.parametrize("name", ["../elsewhere.safetensors", "weights.bin"])
def test_index_that_points_elsewhere(folder: Path, name: str) -> None:
    index = {"weight_map": {"model.norm.weight": name}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=re.escape(name)):
        load(folder)


def test_missing_shard(tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path, max_shard_bytes=100_000)
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(CheckpointError, match=f"{shard.name} is missing"):
        load(tmp_path)


def test_tensor_that_is_not_in_the_shard_of_the_index(tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path, max_shard_bytes=100_000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.norm.weight"] = index["weight_map"]["model.embed_tokens.weight"]
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"missing model.norm.weight"):
        load(tmp_path)


def test_folder_that_is_none(tmp_path: Path) -> None:
    assert locate_checkpoint(str(tmp_path)) == tmp_path
    with pytest.raises(CheckpointError, match="which is no folder"):
        locate_checkpoint(str(tmp_path / "nowhere"))
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="found the file"):
        locate_checkpoint(str(tmp_path / "file"))
    with pytest.raises(CheckpointError, match=r"^tokenizer: found '.*/nowhere', which is no folder"):
        locate_checkpoint(str(tmp_path / "nowhere"), option="tokenizer")


def test_a_tokenizer_that_is_nowhere_is_named(tiny_checkpoint: Path) -> None:
    with pytest.raises(CheckpointError, match=r"^tokenizer: found '/nowhere'"):
        assemble(EngineConfig(model=str(tiny_checkpoint), tokenizer="/nowhere"))


def test_hub_id_without_a_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="neither a local folder nor in the local hub cache"):
        locate_checkpoint("someone/some-model-that-is-not-cached")


def test_the_tables_of_families_agree() -> None:
    assert set(FAMILIES) == set(SUPPORTED)
    assert not set(SUPPORTED) & set(REFUSED_ARCHITECTURES)
    for architecture, (module, _) in FAMILIES.items():
        assert module.startswith("losa_runtime.models.")
        assert family_class(architecture).__module__ == module
    with pytest.raises(CheckpointError, match=r"found 'NovelLM', allowed: .*SDARForCausalLM"):
        family_class("NovelLM")
