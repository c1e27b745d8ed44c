"""The `losa` command: finds the subcommand and runs it. What a subcommand does is known in `commands`."""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Sequence

import losa_runtime
from losa_server.commands import generate, make_checkpoint, serve

COMMANDS = (serve, generate, make_checkpoint)

# Options of other servers that people type from memory -> ours.
FOREIGN_OPTIONS = {
    "--max-model-len": "--context-length",
    "--max-num-seqs": "--max-running-requests",
    "--gpu-memory-utilization": "--mem-fraction-static",
    "--seed": "--random-seed",
    "--block-size": "--page-size (K/V pages) or --block-length (diffusion blocks)",
    "--no-enable-prefix-caching": "--disable-radix-cache",
    "--dllm-algorithm": "--algorithm",
}


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
    """Run a command; its exit code."""
    parser, subparsers = make_parser()
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        subparser = subparsers[args.command]
        subparser.error("\n  ".join(f"unknown argument {word}{_hint(word, subparser)}" for word in unknown))
    code: int = args.run(args)
    return code


def _hint(word: str, parser: argparse.ArgumentParser) -> str:
    name = word.partition("=")[0]
    if name in FOREIGN_OPTIONS:
        return f" (here: {FOREIGN_OPTIONS[name]})"
    known = [option for action in parser._actions for option in action.option_strings]
    close = difflib.get_close_matches(name, known, n=1)
    return f" (did you mean {close[0]}?)" if close else ""


if __name__ == "__main__":
    sys.exit(main())
