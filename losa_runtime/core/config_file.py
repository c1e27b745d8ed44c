"""The JSON files of a checkpoint folder, and how one says what is wrong in them. Knows no model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from losa_runtime.core.errors import CheckpointError

CONFIG_FILE = "config.json"
GENERATION_FILE = "generation_config.json"
TOKENIZER_FILE = "tokenizer.json"
SETTINGS_FILE = "tokenizer_config.json"
MISSING: Any = object()


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises CheckpointError when there is no such file or it holds something else."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from None
    except ValueError as error:
        raise CheckpointError(f"{path}: is not JSON: {error}") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: found a JSON {type(data).__name__}, allowed: an object")
    return data


def refusal(path: Path, field: str, found: object, allowed: str) -> CheckpointError:
    """The error for one field of a file."""
    return CheckpointError(f"{path}: {field}: found {found!r}, allowed: {allowed}")


def in_words(message: str) -> str:
    """What is allowed, from a validator's message."""
    if message == "Field required":
        return "a value (the field is required)"
    return message.removeprefix("Value error, ").removeprefix("Input should be ")


def first_of(*candidates: Any) -> Any:
    """The first that is not None."""
    return next((c for c in candidates if c is not None), None)


def whole_numbers(path: Path, raw: dict[str, Any], field: str, default: Any = MISSING) -> tuple[int, ...]:
    """A field that holds a list of integers, none below 0."""
    value = raw.get(field)
    if value is None and default is not MISSING:
        return tuple(default)
    if not isinstance(value, list) or any(type(i) is not int or i < 0 for i in value):
        raise refusal(path, field, value, "a list of integers, none below 0")
    return tuple(value)


def whole_number(path: Path, raw: dict[str, Any], field: str, least: int, default: int | None = None) -> int:
    """A field that holds an integer; an absent one is refused unless there is a default."""
    value = raw.get(field)
    if value is None:
        value = default
    if type(value) is not int or value < least:
        raise refusal(path, field, value, f"an integer of at least {least}")
    return value
