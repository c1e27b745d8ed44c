"""`losa serve`: the HTTP server with its engine process."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from losa_runtime.core.config import EngineConfig
from losa_runtime.core.errors import LosaError
from losa_server.configuration.flags import add_settings, settings_from
from losa_server.configuration.printout import as_yaml
from losa_server.settings import ServerSettings

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]


def add_parser(subparsers: Subparsers) -> argparse.ArgumentParser:
    """Register the command and its options."""
    parser = subparsers.add_parser(
        "serve",
        allow_abbrev=False,
        usage="losa serve --model-path PATH [options]",
        help="start the server",
        description="Serve a block-diffusion language model over HTTP: SGLang's native API, for its frontend language, "
        "and OpenAI's, for everybody else.",
    )
    add_settings(parser, ServerSettings, EngineConfig)
    parser.set_defaults(run=run)
    return parser


def run(args: argparse.Namespace) -> int:
    """Serve until told to stop. 0 after an orderly end, 1 after a failure, with one line about it on stderr.

    Raises ConfigError for settings that are wrong in themselves."""
    configuration = settings_from(args, ServerSettings, EngineConfig)
    settings, config = configuration.make(ServerSettings), configuration.make(EngineConfig)
    if args.print_config:
        print(as_yaml(configuration, settings, config), end="")
        return 0

    from losa_server.launch import serve_until_stopped

    try:
        return serve_until_stopped(config, settings)
    except (LosaError, ValueError) as error:
        print(f"losa serve: error: {error}", file=sys.stderr)
        return 1
