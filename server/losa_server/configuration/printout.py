"""The settings as YAML that `--config` takes, each with where it came from. Secrets are left out."""

from __future__ import annotations

from typing import Any

import yaml
from pydantic import BaseModel

from losa_server.configuration.sources import Configuration


def as_yaml(configuration: Configuration, *settings: BaseModel) -> str:
    """All settings of these models, grouped; behind each, unless it is the default, its origin."""
    values: dict[str, Any] = {}
    for model in settings:
        values |= model.model_dump(mode="json")
    lines: list[str] = []
    group = ""
    for option in sorted(configuration.options, key=lambda o: _order(configuration, o.group)):
        if option.group != group:
            group = option.group
            lines += [*([""] if lines else []), f"# {group}"]
        given = configuration.given.get(option.field)
        origin = "" if given is None else f"  # {given.origin}"
        name = option.names[0]
        if option.is_secret and given is not None:
            lines.append(f"# {name}: given, not shown{origin}")
        else:
            lines.append(f"{name}: {_scalar(values[option.field])}{origin}")
    return "\n".join(lines) + "\n"


def _order(configuration: Configuration, group: str) -> int:
    return [option.group for option in configuration.options].index(group)


def _scalar(value: Any) -> str:
    text: str = yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...")
