"""The `losa` command: finds the subcommand and runs it. What a subcommand does is known in `commands`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import losa_runtime
from losa_runtime.core.errors import ConfigError
from losa_server.commands import bench, chat, env, generate, make_checkpoint, serve
from losa_server.configuration.hints import hint

COMMANDS = (serve, generate, chat, bench, env, make_checkpoint)


def make_parser() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """The parser and its subparsers by name."""
    parser = argparse.ArgumentParser(
        prog="losa", description="A serving runtime for block-diffusion language models with sparse attention."
    )
    parser.add_argument("--version", action="version", version=f"losa-runtime {losa_runtime.__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="command", required=True)
    for command in COMMANDS:
        command.add_parser(subparsers)
    return parser, dict(subparsers.choices)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; its exit code. 2: the command line or the settings are wrong."""
    words = list(sys.argv[1:] if argv is None else argv)
    parser, subparsers = make_parser()
    if not words:
        parser.print_help(sys.stderr)
        return 2
    if not words[0].startswith("-") and words[0] not in subparsers:
        near = hint(words[0], subparsers)
        parser.error(f"there is no command {words[0]}{near}; there are: {', '.join(subparsers)}")
    args, unknown = parser.parse_known_args(words)
    if unknown:
        subparsers[args.command].error(_unknown(unknown, subparsers[args.command]))
    try:
        code: int = args.run(args)
    except ConfigError as error:
        print(f"losa {args.command}: error: {error}", file=sys.stderr)
        return 2
    return code


def _unknown(words: Sequence[str], parser: argparse.ArgumentParser) -> str:
    """The words that nobody understood; what stands behind an unknown flag is taken for its value."""
    flags = [
        option for action in parser._actions if action.help != argparse.SUPPRESS for option in action.option_strings
    ]
    odd = [i for i, word in enumerate(words) if i == 0 or word.startswith("-") or not words[i - 1].startswith("-")]
    names = [words[i].partition("=")[0] for i in odd]
    return "\n  ".join(f"unknown argument {name}{hint(name, flags)}" for name in names)


if __name__ == "__main__":
    sys.exit(main())
