"""`losa generate`: complete one prompt without a server."""

from __future__ import annotations

import argparse
import os
import sys
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from losa_runtime.core.config import EngineConfig
from losa_runtime.core.errors import LosaError
from losa_runtime.core.sampling_params import SamplingParams
from losa_server.configuration.flags import add_settings, settings_from
from losa_server.configuration.printout import as_yaml
from losa_server.spinning import spins_briefly

if TYPE_CHECKING:
    from losa_runtime.llm import LLM, Completion

    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]


def add_parser(subparsers: Subparsers) -> argparse.ArgumentParser:
    """Register the command and its options."""
    parser = subparsers.add_parser(
        "generate",
        allow_abbrev=False,
        usage="losa generate --model-path PATH [--prompt TEXT] [options]",
        help="complete one prompt, offline",
        description="Load a model, complete one prompt, print the text (stdout) and what it cost (stderr).",
    )
    prompt = parser.add_argument_group("prompt")
    prompt.add_argument("--prompt", default=None, help="text to complete; - or nothing reads standard input")
    prompt.add_argument(
        "--chat", action="store_true", help="put the prompt into the model's chat template as a user turn"
    )
    sampling = parser.add_argument_group("sampling")
    sampling.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="default: %(default)s")
    sampling.add_argument("--temperature", type=float, default=0.0, metavar="F", help="0 is greedy (default: 0)")
    sampling.add_argument("--top-p", type=float, default=1.0, metavar="F", help="default: 1")
    sampling.add_argument("--stop", action="append", default=[], metavar="TEXT", help="stop string; may be repeated")
    sampling.add_argument("--seed", type=int, default=None, metavar="N", help="of this completion")
    sampling.add_argument("--ignore-eos", action="store_true", help="go on to --max-new-tokens")
    add_settings(parser, EngineConfig)
    parser.set_defaults(run=run)
    return parser


def run(args: argparse.Namespace) -> int:
    """Complete and print; 0 on success, 1 with the reason on stderr. Raises ConfigError for wrong settings."""
    configuration = settings_from(args, EngineConfig)
    config = configuration.make(EngineConfig)
    if args.print_config:
        print(as_yaml(configuration, config), end="")
        return 0
    try:
        params = SamplingParams.parse(
            {
                "max_new_tokens": args.max_new_tokens,
                "temperature": args.temperature,
                "top_p": args.top_p,
                "stop": args.stop,
                "sampling_seed": args.seed,
                "ignore_eos": args.ignore_eos,
            }
        )
        options: dict[str, Any] = config.model_dump(exclude_unset=True)
        text = sys.stdin.read() if args.prompt in (None, "-") else args.prompt

        os.environ.update(spins_briefly(os.environ))
        from losa_runtime.llm import LLM  # loads torch, which --help need not

        llm = LLM(**options)
        if args.chat:
            text = llm.tokenizer.apply_chat_template([{"role": "user", "content": text}])
        completion = llm.generate([text], params)[0]
    except LosaError as error:
        print(f"losa generate: error: {error}", file=sys.stderr)
        return 1
    print(completion.text)
    Console(stderr=True).print(_costs(completion, llm))
    return 0


def _costs(completion: Completion, llm: LLM) -> Table:
    stats = completion.stats
    table = Table("tokens", "cached", "blocks", "steps", "forwards", "KV density", "active share", "ended by")
    shares = [("–" if value is None else f"{value:.1%}") for value in (stats.kv_density, stats.active_share)]
    counts = (len(completion.token_ids), completion.cached_tokens, stats.blocks, stats.denoise_steps, stats.forwards)
    table.add_row(*map(str, counts), *shares, completion.finish.type)
    table.title = f"{llm.engine.config.sparse_method}, prompt of {completion.prompt_tokens} tokens"
    return table
