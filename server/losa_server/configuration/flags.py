"""The settings models on a command line: one flag per option, in the groups that the models name."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from losa_runtime.core.config import EngineConfig
from losa_runtime.core.errors import ConfigError
from losa_server.bench.settings import BenchSettings
from losa_server.chat.settings import ChatSettings
from losa_server.configuration.options import Model, Option, options_of
from losa_server.configuration.sources import CONFIG_VARIABLE, Configuration, read_configuration
from losa_server.settings import ClientSettings, ServerSettings

ALL_MODELS: tuple[Model, ...] = (ServerSettings, EngineConfig, ClientSettings, BenchSettings, ChatSettings)


def add_settings(parser: argparse.ArgumentParser, *models: Model) -> None:
    """Add a flag for every option of the models, and --config and --print-config."""
    source = parser.add_argument_group(
        "configuration",
        "A flag wins over a variable LOSA_NAME, that over the file, that over the default; --no-NAME undoes a switch.",
    )
    source.add_argument("--config", type=Path, default=None, metavar="FILE", help="YAML file with settings by name")
    source.add_argument("--print-config", action="store_true", help="print all settings as such a file, and end")
    groups: dict[str, argparse._ArgumentGroup] = {}
    for option in options_of(*models):
        if option.group not in groups:
            groups[option.group] = parser.add_argument_group(option.group)
        _add(groups[option.group], option)


def settings_from(args: argparse.Namespace, *models: Model) -> Configuration:
    """What flags, environment and file say about the models. Raises ConfigError naming the wrong one."""
    options = options_of(*models)
    given: dict[str, Any] = {o.field: getattr(args, o.field) for o in options if hasattr(args, o.field)}
    file = args.config or os.environ.get(CONFIG_VARIABLE) or None
    return read_configuration(options, options_of(*ALL_MODELS), given, os.environ, Path(file) if file else None)


def engine_to_start(configuration: Configuration, client: ClientSettings) -> EngineConfig | None:
    """What to start if no URL says what is running. Raises ConfigError for flags that then mean nothing."""
    if client.url is None:
        return configuration.make(EngineConfig)
    for field, given in configuration.given.items():
        if field in EngineConfig.model_fields and given.origin.startswith("--"):
            raise ConfigError(f"{given.origin}: describes a server to be started, but --url names a running one")
    return None


def _add(group: argparse._ArgumentGroup, option: Option) -> None:
    # SUPPRESS: a flag that is not given is absent, so that other sources and the model's default have their turn.
    common: dict[str, Any] = {"dest": option.field, "default": argparse.SUPPRESS}
    if option.is_switch:
        group.add_argument(*option.flags, action="store_true", help=option.text, **common)
        # Takes back what a file or a variable says.
        negated = [flag.replace("--", "--no-", 1) for flag in option.flags]
        group.add_argument(*negated, action="store_false", help=argparse.SUPPRESS, **common)
        return
    text = option.text.replace("%", "%%")
    if option.default not in (..., None, (), {}) and option.default != "":
        text += f" (default: {option.default})".replace("%", "%%")
    group.add_argument(*option.flags, metavar=option.metavar, help=text, **common)
