"""Where the value of a setting comes from, and who wins: a flag, a LOSA_… variable, the YAML file, the default.

A name that nobody declared is refused wherever it stands, with what was probably meant.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from losa_runtime.core.errors import ConfigError
from losa_server.configuration.hints import hint
from losa_server.configuration.options import PREFIX, Option

M = TypeVar("M", bound=BaseModel)

CONFIG_VARIABLE = PREFIX + "CONFIG"
# Variables with the same prefix that are read elsewhere: the kernels' library and its instruction set.
OTHER_VARIABLES = {CONFIG_VARIABLE, PREFIX + "SIMD", PREFIX + "KERNELS"}


class Given(NamedTuple):
    """A value with its origin as a person would call it, e.g. `--page-size` or `page_size in serve.yaml`."""

    value: Any
    origin: str


class Configuration:
    """What was said about the settings; `make` turns it into a model."""

    def __init__(self, options: Sequence[Option], given: Mapping[str, Given]) -> None:
        self.options, self.given = options, given

    def make(self, model: type[M]) -> M:
        """The settings of one model. Raises ConfigError that says where the wrong value stands."""
        values = {name: given.value for name, given in self.given.items() if name in model.model_fields}
        try:
            return model.model_validate(values)
        except ValidationError as error:
            raise ConfigError(self._explain(error)) from None

    def _explain(self, error: ValidationError) -> str:
        first = error.errors(include_url=False, include_input=True)[0]
        field, *inner = (str(part) for part in first["loc"]) if first["loc"] else ("configuration",)
        option = next((o for o in self.options if o.field == field), None)
        if option is not None and first["type"] == "missing" and not inner:
            return f"{option.flags[0]} is required (or {option.variables[0]}, or {option.names[0]} in a --config file)"
        where = self.given[field].origin if field in self.given else field
        found = "" if option is not None and option.is_secret else f"found {first['input']!r}: "
        return ".".join((where, *inner)) + f": {found}{first['msg']}"


def read_configuration(
    options: Sequence[Option],
    known: Sequence[Option],
    flags: Mapping[str, Any],
    environ: Mapping[str, str],
    file: Path | None,
) -> Configuration:
    """Put the layers on top of one another.

    options: those of the command. known: those of all commands, which a file or an environment may hold as well.
    flags: field -> word (switches: bool). Raises ConfigError.
    """
    by_field = {option.field: option for option in options}
    given = _from_file(known, file) if file is not None else {}
    given |= _from_environment(known, environ)
    for field, word in flags.items():
        flag = by_field[field].flags[0]
        given[field] = Given(_read(by_field[field], word, flag) if isinstance(word, str) else word, flag)
    return Configuration(options, {field: value for field, value in given.items() if field in by_field})


def _read(option: Option, text: str, origin: str) -> Any:
    try:
        return option.read(text)
    except ValueError as error:
        found = "" if option.is_secret else f"found {text!r}: "
        raise ConfigError(f"{origin}: {found}{error}") from None


def _from_environment(known: Sequence[Option], environ: Mapping[str, str]) -> dict[str, Given]:
    by_variable = {variable: option for option in known for variable in option.variables}
    given: dict[str, Given] = {}
    for name, text in environ.items():
        if not name.startswith(PREFIX) or name in OTHER_VARIABLES:
            continue
        if name not in by_variable:
            raise ConfigError(f"{name}: no such setting{hint(name, by_variable)}")
        option = by_variable[name]
        _add(given, option, Given(_read(option, text, name), name))
    return given


def _from_file(known: Sequence[Option], file: Path) -> dict[str, Given]:
    by_name = {name: option for option in known for name in option.names}
    given: dict[str, Given] = {}
    for key, value in _mapping(file).items():
        name = str(key).replace("-", "_")
        origin = f"{key} in {file}"
        if name not in by_name:
            raise ConfigError(f"{origin}: no such setting{hint(name, by_name)}")
        option = by_name[name]
        _add(given, option, Given(_read(option, value, origin) if isinstance(value, str) else value, origin))
    return given


def _add(given: dict[str, Given], option: Option, value: Given) -> None:
    if option.field in given:
        raise ConfigError(f"{value.origin}: the same setting as {given[option.field].origin}; keep one of them")
    given[option.field] = value


class _Loader(yaml.SafeLoader):
    """A safe loader that refuses a key that stands twice, of which YAML would silently take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [self.construct_object(key) for key, _ in node.value]
        twice = next((key for key in keys if keys.count(key) > 1), None)
        if twice is not None:
            raise yaml.constructor.ConstructorError(None, None, f"{twice!r} stands there twice", node.start_mark)
        return super().construct_mapping(node, deep)


def _mapping(file: Path) -> dict[Any, Any]:
    try:
        with file.open(encoding="utf-8") as stream:
            data = yaml.load(stream, _Loader)
    except OSError as error:
        raise ConfigError(f"--config: {file} cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config: {file} is not YAML: {error}") from None
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ConfigError(f"--config: {file} holds {type(data).__name__}, allowed: a mapping from settings to values")
    return data
