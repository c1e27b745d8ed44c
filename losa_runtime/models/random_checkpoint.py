"""Writes a loadable checkpoint folder with random weights: for tests, demonstrations and speed measurements.

Nothing is downloaded: the tokenizer is byte-level, one token per byte plus the ChatML specials and the mask. Shards are
written as they fill, so memory stays at one shard. What such a model says is noise. Knows no engine.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from losa_runtime.core.config_file import CONFIG_FILE, GENERATION_FILE
from losa_runtime.core.errors import ConfigError
from losa_runtime.core.model_config import ModelConfig
from losa_runtime.layers.pieces import places
from losa_runtime.models.model import BlockDiffusionModel, empty_model
from losa_runtime.models.presets import FAMILY_FIELDS, PRESETS
from losa_runtime.models.weights import INDEX_FILE, SINGLE_FILE, assign, byte_progress
from losa_runtime.tokenizer import byte_alphabet

SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|MASK|>")  # ids 256 .. 259
END_OF_TEXT, IM_START, IM_END, MASK = range(256, 260)
GENERATION = {"eos_token_id": [IM_END, END_OF_TEXT], "pad_token_id": END_OF_TEXT}
CHAT_TEMPLATE = """\
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- endif %}"""


def write_random_checkpoint(
    folder: str | Path,
    preset: str = "tiny",
    *,
    architecture: str | None = None,
    seed: int = 0,
    dtype: str | None = None,
    max_shard_bytes: int = 2 * 1024**3,
    overwrite: bool = False,
    show_progress: bool = False,
    **overrides: Any,
) -> ModelConfig:
    """Write config, weights and tokenizer into `folder` (created if needed) and return the configuration.

    architecture: None = the preset's. overrides: config.json fields in place of the preset's and the family's, e.g.
    `num_hidden_layers=3`, `block_size=4`. dtype: of the tensors. Equal arguments give equal tensors however they are
    sharded. Raises ConfigError for an unknown preset, architecture or override, a folder that already holds a
    checkpoint, or a full disk; CheckpointError for a shape that makes no sense.
    """
    folder = Path(folder)
    raw = _config(preset, architecture, overrides | ({} if dtype is None else {"dtype": dtype}))
    if (folder / CONFIG_FILE).exists() and not overwrite:
        raise ConfigError(f"folder: found a checkpoint in {folder}, allowed: an empty folder, or overwrite")
    config = ModelConfig.from_dict(raw, GENERATION, folder)
    folder.mkdir(parents=True, exist_ok=True)
    for stale in (*folder.glob("model*.safetensors"), folder / INDEX_FILE, folder / CONFIG_FILE):
        stale.unlink(missing_ok=True)
    write_byte_tokenizer(folder, config.max_context)
    _write_weights(folder, config, seed, max_shard_bytes, show_progress)
    _write_json(folder / GENERATION_FILE, GENERATION)
    # Last, because a folder becomes loadable with its config.json.
    _write_json(folder / CONFIG_FILE, raw)
    return config


def random_model(
    preset: str,
    dtype: torch.dtype,
    device: torch.device,
    *,
    architecture: str | None = None,
    seed: int = 0,
    **overrides: Any,
) -> BlockDiffusionModel:
    """Such a model without a folder, its weights drawn on the device (others than those of a checkpoint).

    overrides and errors: as in `write_random_checkpoint`.
    """
    config = ModelConfig.from_dict(_config(preset, architecture, overrides), GENERATION, Path(preset))
    model = empty_model(config)
    generator = torch.Generator(device).manual_seed(seed)
    for name, parameter in list(model.named_parameters()):
        tensor = torch.empty(parameter.shape, dtype=dtype, device=device)
        assign(model, name, tensor.normal_(*_spread(name, parameter.shape, config), generator=generator))
    return model.to(device).eval().requires_grad_(False)


def write_byte_tokenizer(folder: Path, max_length: int) -> None:
    """Write tokenizer.json and tokenizer_config.json: ids 0-255 are the bytes, 256-259 are `SPECIALS`."""
    vocabulary = {symbol: byte for byte, symbol in enumerate(byte_alphabet())}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIALS])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_length,
        "bos_token": None,
        "eos_token": SPECIALS[IM_END - 256],
        "pad_token": SPECIALS[END_OF_TEXT - 256],
        "mask_token": SPECIALS[MASK - 256],
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    _write_json(folder / "tokenizer_config.json", settings)


def _config(preset: str, architecture: str | None, overrides: dict[str, Any]) -> dict[str, Any]:
    if preset not in PRESETS:
        raise ConfigError(f"preset: found {preset!r}, allowed: {', '.join(PRESETS)}")
    shape = dict(PRESETS[preset])
    own = shape.pop("architecture", None)
    architecture = architecture or str(own or "SDARForCausalLM")
    if architecture not in FAMILY_FIELDS or own not in (None, architecture):
        allowed = own or ", ".join(FAMILY_FIELDS)
        raise ConfigError(f"architecture: found {architecture!r}, allowed: {allowed} (with preset {preset!r})")
    fixed = {"hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_scaling": None}
    ids = {"mask_token_id": MASK, "eos_token_id": IM_END, "pad_token_id": END_OF_TEXT}
    raw = {"architectures": [architecture], **FAMILY_FIELDS[architecture], **shape, **fixed, **ids}
    unknown = sorted(set(overrides) - set(raw))
    if unknown:
        raise ConfigError(f"{unknown[0]}: found {overrides[unknown[0]]!r}, allowed: one of {', '.join(sorted(raw))}")
    raw |= overrides
    if not isinstance(raw["vocab_size"], int) or raw["vocab_size"] <= MASK:
        raise ConfigError(f"vocab_size: found {raw['vocab_size']!r}, allowed: at least {MASK + 1}")
    return raw


def _random_tensors(config: ModelConfig, seed: int) -> Iterator[tuple[str, Tensor]]:
    """Tensors in the module's order from one generator, scaled so that activations stay near one in every layer."""
    generator = torch.Generator().manual_seed(seed)
    dtype: torch.dtype = getattr(torch, config.dtype)
    for name, place in places(empty_model(config)).items():
        tensor = torch.empty(place.shape, dtype=dtype)
        yield name, tensor.normal_(*_spread(name, place.shape, config), generator=generator)


def _spread(name: str, shape: Sequence[int], config: ModelConfig) -> tuple[float, float]:
    """Mean and standard deviation of a parameter's numbers."""
    if len(shape) == 1:
        return (0.0 if name.endswith("bias") else 1.0), 0.1
    if "embed" in name and not config.tie_word_embeddings:
        return 0.0, 1.0
    return 0.0, shape[-1] ** -0.5


def _write_weights(folder: Path, config: ModelConfig, seed: int, max_shard_bytes: int, show_progress: bool) -> None:
    itemsize = getattr(torch, config.dtype).itemsize
    sizes = {name: place.numel * itemsize for name, place in places(empty_model(config)).items()}
    total, free = sum(sizes.values()), shutil.disk_usage(folder).free
    if total > free:
        raise ConfigError(f"folder: found {free} bytes free in {folder}, allowed: at least {total} for these weights")
    shard_of: dict[str, int] = {}
    shard, filled = 0, 0
    for name, size in sizes.items():
        if filled and filled + size > max_shard_bytes:
            shard, filled = shard + 1, 0
        shard_of[name] = shard
        filled += size
    files = [SINGLE_FILE]
    if shard:
        files = [f"model-{i + 1:05d}-of-{shard + 1:05d}.safetensors" for i in range(shard + 1)]
    pending: dict[str, Tensor] = {}
    current = 0
    with byte_progress(show_progress) as progress:
        task = progress.add_task("writing weights", total=total)
        for name, tensor in _random_tensors(config, seed):
            if shard_of[name] != current:
                save_file(pending, folder / files[current], metadata={"format": "pt"})
                pending, current = {}, shard_of[name]
            pending[name] = tensor
            progress.advance(task, sizes[name])
    save_file(pending, folder / files[current], metadata={"format": "pt"})
    if shard:
        weight_map = {name: files[index] for name, index in shard_of.items()}
        _write_json(folder / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _write_json(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
