"""`losa bench`: a load test against a running server, or one that is started for it."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from losa_runtime.core.config import EngineConfig
from losa_runtime.core.errors import ConfigError, LosaError
from losa_server.bench.settings import BenchSettings
from losa_server.configuration.flags import add_settings, engine_to_start, settings_from
from losa_server.configuration.printout import as_yaml
from losa_server.configuration.sources import OTHER_VARIABLES
from losa_server.settings import ClientSettings

if TYPE_CHECKING:
    from losa_server.bench.calls import Record

    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

INTERRUPTED, TERMINATED = 130, 143


def add_parser(subparsers: Subparsers) -> argparse.ArgumentParser:
    """Register the command and its options."""
    parser = subparsers.add_parser(
        "bench",
        allow_abbrev=False,
        usage="losa bench (--url URL | --model-path PATH) [options]",
        help="measure a server under load",
        description="Send seeded requests to a running server, or to one that is started with the given model and "
        "ended afterwards. Tables go to stderr, the result as one line of JSON to stdout.",
    )
    add_settings(parser, ClientSettings, BenchSettings, EngineConfig)
    parser.set_defaults(run=run)
    return parser


def run(args: argparse.Namespace) -> int:
    """Measure and report. 0 if every request was answered, else 1. Raises ConfigError for wrong settings."""
    configuration = settings_from(args, ClientSettings, BenchSettings, EngineConfig)
    client, settings = configuration.make(ClientSettings), configuration.make(BenchSettings)
    config = engine_to_start(configuration, client)
    if args.print_config:
        print(as_yaml(configuration, client, settings, *([config] if config else [])), end="")
        return 0
    console = Console(stderr=True)
    try:
        with ExitStack() as stack:
            url, key = client.url, client.api_key.get_secret_value() if client.api_key else None
            if config is not None:
                _leave_in_order(stack)
                with console.status(f"loading {config.model}"):
                    url, key = start(stack, config), None
            assert url is not None
            outcome, records = _measure(url, key, settings, console)
    except ConfigError:
        raise
    except LosaError as error:
        print(f"losa bench: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return INTERRUPTED
    return _report(settings, outcome, records, console)


def _leave_in_order(stack: ExitStack) -> None:
    """A SIGTERM becomes an exit, so that a server that was started here is ended, too."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))
    stack.callback(signal.signal, signal.SIGTERM, before)


def start(stack: ExitStack, config: EngineConfig) -> str:
    """Start a server that ends with the stack; its URL. Raises ServerFailed."""
    from losa_server.bench.running_server import RunningServer

    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    file = folder / "serve.yaml"
    file.write_text(yaml.safe_dump(config.model_dump(mode="json", exclude_unset=True, exclude={"model"})))
    # All settings are in the file already; a variable would win over it.
    environ = {k: v for k, v in os.environ.items() if not k.startswith("LOSA_") or k in OTHER_VARIABLES}
    environ.pop("LOSA_CONFIG", None)
    options = ["--config", str(file), "--log-level", "warning"]
    return stack.enter_context(RunningServer(config.model, options, ready_s=600.0, environ=environ)).url


def _measure(
    url: str, key: str | None, settings: BenchSettings, console: Console
) -> tuple[dict[str, Any], list[Record]]:
    from losa_server.bench.run import measure

    columns = (TextColumn("measuring"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("measuring", total=settings.num_prompts)
        return asyncio.run(measure(url, key, settings, lambda: progress.advance(bar)))


def _report(settings: BenchSettings, outcome: dict[str, Any], records: list[Record], console: Console) -> int:
    from losa_server.bench.measure import details
    from losa_server.bench.report import show

    show(console, outcome, records)
    if settings.output_file is not None:
        line = outcome | (details(records) if settings.output_details else {})
        with settings.output_file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
    print(json.dumps(outcome))
    return 1 if outcome["failed"] or not outcome["completed"] else 0
