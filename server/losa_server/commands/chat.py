"""`losa chat`: a conversation in the terminal, with a server or with a model in this process."""

from __future__ import annotations

import argparse
import os
import sys
from typing import TYPE_CHECKING

from rich.console import Console

from losa_runtime.core.config import EngineConfig
from losa_runtime.core.errors import ConfigError, LosaError
from losa_server.chat.session import standard
from losa_server.chat.settings import ChatSettings
from losa_server.configuration.flags import add_settings, engine_to_start, settings_from
from losa_server.configuration.printout import as_yaml
from losa_server.settings import ClientSettings
from losa_server.spinning import spins_briefly

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

INTERRUPTED = 130


def add_parser(subparsers: Subparsers) -> argparse.ArgumentParser:
    """Register the command and its options."""
    parser = subparsers.add_parser(
        "chat",
        allow_abbrev=False,
        usage="losa chat (--url URL | --model-path PATH) [options]",
        help="talk to a model",
        description="Talk to a running server, or to a model that is loaded into this process. In a pipe every line of "
        "standard input is a turn, and only the answers go to standard output.",
    )
    add_settings(parser, ClientSettings, ChatSettings, EngineConfig)
    parser.set_defaults(run=run)
    return parser


def run(args: argparse.Namespace) -> int:
    """Talk; 0 after an orderly end. Raises ConfigError for wrong settings."""
    configuration = settings_from(args, ClientSettings, ChatSettings, EngineConfig)
    client, settings = configuration.make(ClientSettings), configuration.make(ChatSettings)
    config = engine_to_start(configuration, client)
    if args.print_config:
        print(as_yaml(configuration, client, settings, *([config] if config else [])), end="")
        return 0
    try:
        return _with_model(config, settings) if config is not None else _with_server(client, settings)
    except ConfigError:
        raise
    except LosaError as error:
        print(f"losa chat: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return INTERRUPTED


def _with_model(config: EngineConfig, settings: ChatSettings) -> int:
    with Console(stderr=True).status(f"loading {config.model}"):
        os.environ.update(spins_briefly(os.environ))
        from losa_server.chat.local import LocalPartner  # loads torch, which --help need not

        partner = LocalPartner(config, settings)
    return standard(partner, settings.system).run()


def _with_server(client: ClientSettings, settings: ChatSettings) -> int:
    from losa_server.chat.remote import RemotePartner

    assert client.url is not None
    key = client.api_key.get_secret_value() if client.api_key else None
    with RemotePartner(client.url, key, settings) as partner:
        return standard(partner, settings.system).run()
