"""`losa serve`: the HTTP server with its engine process."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from losa_runtime.core.errors import LosaError
from losa_server.commands.engine_flags import add_engine_flags, config_from
from losa_server.settings import ServerSettings

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

LOG_LEVELS = ("debug", "info", "warning", "error")


def add_parser(subparsers: Subparsers) -> argparse.ArgumentParser:
    """Register the command and its options."""
    parser = subparsers.add_parser(
        "serve",
        help="start the server",
        description="Serve a block-diffusion language model over HTTP: SGLang's native API, for its frontend language "
        "and any HTTP client.",
    )
    server = parser.add_argument_group("server")
    server.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    server.add_argument(
        "--port", type=int, default=30000, help="port to listen on; 0 takes a free one (default: 30000)"
    )
    server.add_argument(
        "--served-model-name", default=None, metavar="NAME", help="id under /v1/models (default: the model's path)"
    )
    server.add_argument("--log-level", choices=LOG_LEVELS, default="info", help="default: %(default)s")
    add_engine_flags(parser)
    parser.set_defaults(run=run)
    return parser


def run(args: argparse.Namespace) -> int:
    """Serve until told to stop. 0 after an orderly end, 1 after a failure, with one line about it on stderr."""
    from losa_server.launch import serve_until_stopped

    try:
        config = config_from(args)
        settings = ServerSettings(
            host=args.host, port=args.port, served_model_name=args.served_model_name, log_level=args.log_level
        )
        return serve_until_stopped(config, settings)
    except (LosaError, ValueError) as error:
        print(f"losa serve: error: {error}", file=sys.stderr)
        return 1
