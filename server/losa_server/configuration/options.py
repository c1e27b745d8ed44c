"""The options that the settings models declare (`losa_runtime.core.options.option`), under all their names."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin

from pydantic import BaseModel, SecretStr

Model = type[BaseModel]
PREFIX = "LOSA_"


class Option(NamedTuple):
    """names: in files, the shown one first; flags and variables are made of them. kinds: the types of its values.

    choices: the only values, if they are words. default: `...` if there is none.
    """

    field: str
    names: tuple[str, ...]
    group: str
    text: str
    metavar: str
    kinds: tuple[Any, ...]
    choices: tuple[Any, ...]
    default: Any

    @property
    def flags(self) -> tuple[str, ...]:
        """E.g. --model-path, --model."""
        return tuple("--" + name.replace("_", "-") for name in self.names)

    @property
    def variables(self) -> tuple[str, ...]:
        """E.g. LOSA_MODEL_PATH, LOSA_MODEL."""
        return tuple(PREFIX + name.upper() for name in self.names)

    @property
    def is_switch(self) -> bool:
        """On or off."""
        return self.kinds == (bool,)

    @property
    def is_secret(self) -> bool:
        """Never to be printed."""
        return any(kind is SecretStr or SecretStr in get_args(kind) for kind in self.kinds)

    def read(self, text: str) -> Any:
        """A word from a command line or the environment as the model takes it. Raises ValueError with the reason."""
        if text.lower() == "none" and NoneType in self.kinds and str not in self.kinds:
            return None
        origins = {get_origin(kind) or kind for kind in self.kinds}
        if any(origin is dict or (isinstance(origin, type) and issubclass(origin, BaseModel)) for origin in origins):
            return _json_object(text)
        if origins & {tuple, list}:
            return tuple(part.strip() for part in text.split(",") if part.strip())
        return text


def options_of(*models: Model) -> list[Option]:
    """All options of the models, in the order of their declaration. Fields that declare no option are left out."""
    return [option for model in models for option in _options(model)]


def _options(model: Model) -> Iterator[Option]:
    for field, info in model.model_fields.items():
        extra = info.json_schema_extra
        if not isinstance(extra, dict) or "group" not in extra:
            continue
        declared: Any = extra
        kinds = _kinds(info.annotation)
        names = tuple(dict.fromkeys((*declared["names"], field)))
        choices = tuple(value for kind in kinds if get_origin(kind) is Literal for value in get_args(kind))
        default = () if info.default_factory else info.default
        yield Option(
            field=field,
            names=names,
            group=declared["group"],
            text=info.description or "",
            metavar=declared["metavar"] or _metavar(kinds, choices),
            kinds=kinds,
            choices=choices,
            default=... if info.is_required() else default,
        )


def _kinds(annotation: Any) -> tuple[Any, ...]:
    return get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)


def _metavar(kinds: tuple[Any, ...], choices: tuple[Any, ...]) -> str:
    if choices:
        return "{" + ",".join(map(str, choices)) + "}"
    words = {int: "N", float: "F", str: "TEXT", SecretStr: "TEXT", Path: "FILE", tuple: "A,B,…", list: "A,B,…"}
    return next((words[get_origin(kind) or kind] for kind in kinds if (get_origin(kind) or kind) in words), "JSON")


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError("a JSON object is expected")
    return value
