"""Tokens per second of this runtime and of what a user would pick instead, over one shared document.

    python -m benchmarks.peers
    python -m benchmarks.peers --server sglang=http://127.0.0.1:30000 --counts 8

Many questions over one document arrive at once. First every peer answers all of them, greedily: whoever has to be exact
must give the tokens of the plain transformers loop, or nothing is timed. Then all run in turn, several times; medians
of visible tokens per second. Our own variants start every run with an empty cache. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.peers.ours import VARIANTS, Ours, room_for
from benchmarks.peers.peer import Peer, Prompt, Task
from benchmarks.peers.plain_loop import Batched, OneByOne, Reusing, load_transformers
from benchmarks.peers.race import Differs, Race, Run, speeds
from benchmarks.peers.servers import ServerError, ServerPeer, server_peer
from benchmarks.peers.workload import Facts, facts_of, prompts_over_document, task_for
from benchmarks.result_file import add_row, circumstances
from losa_runtime.core.errors import LosaError

CHECKPOINT = Path(__file__).parents[1] / "tiny_model" / "checkpoint"
BASELINES: dict[str, type[OneByOne] | type[Batched]] = {p.name: p for p in (OneByOne, Reusing, Batched)}
ASKED = ("document", "output", "threshold", "rounds", "sample", "budget", "threads")


def main(argv: Sequence[str] | None = None) -> int:
    """Prove and measure; 1 if a peer does not do the same work or does not answer."""
    parser = _parser()
    args = parser.parse_args(argv)
    try:
        servers = [server_peer(text, args.server_fields, args.server_key) for text in args.server]
    except ValueError as error:
        parser.error(f"--server: {error}")
    if args.cpu_time and (args.threads != 1 or servers):
        parser.error("--cpu-time: allowed with --threads 1 and no --server, so that all work is on this thread")
    torch.set_num_threads(args.threads)
    console = Console(stderr=True, width=max(120, Console(stderr=True).width))
    facts, tokenizer = facts_of(args.model)
    prompts = prompts_over_document(tokenizer, args.document, max(args.counts))
    task = task_for(facts, args.output, args.steps, args.threshold, args.stops)
    longest = max(map(len, prompts)) + args.output
    if longest > facts.max_context:
        parser.error(f"--document: prompt and output take {longest} tokens, allowed: {facts.max_context} of this model")
    try:
        with ExitStack() as stack, console.status("loading") as status:
            peers = _peers(args, facts, prompts, task, servers)
            for peer in peers:
                stack.callback(peer.close)
            clock = time.process_time if args.cpu_time else time.perf_counter
            race = Race(peers, prompts, task, tokenizer.decode, args.sample, clock)
            race.prove(status.update)
            exact = ", ".join(peer.name for peer in peers if peer.exact)
            console.print(f"the same tokens from: {exact}; equal shares of the others below")
            runs = race.run(args.counts, args.rounds, status.update)
    except (Differs, ServerError, LosaError) as error:
        console.print(str(error), style="red", markup=False, soft_wrap=True)
        return 1
    row = _row(args, facts, race, runs)
    console.print(_table(args.counts, race, runs))
    if args.results is not None:
        add_row(args.results, row | circumstances(torch.device("cpu")))
    print(json.dumps(row))
    return 0


def _peers(
    args: argparse.Namespace, facts: Facts, prompts: list[Prompt], task: Task, servers: Sequence[ServerPeer]
) -> list[Peer]:
    """The baselines, our variants, the servers; the batch-1 loop first, as the reference."""
    model = load_transformers(facts.folder)
    peers: list[Peer] = [BASELINES[name](model, facts) for name in (OneByOne.name, *args.baselines)]
    for variant in args.variants:
        room = room_for(prompts, task, shared=variant != "radix_off")
        peers.append(Ours(variant, facts, len(prompts), room, args.budget))
    return [*peers, *servers]


def _row(args: argparse.Namespace, facts: Facts, race: Race, runs: list[Run]) -> dict[str, Any]:
    """What was measured. The two headline ratios are of our dense variant, whose answers are proven equal."""
    found = speeds(runs)
    compared = {
        base: {peer: _ratios(of, found[base]) for peer, of in found.items() if peer not in BASELINES}
        for base in BASELINES
        if base in found
    }
    row: dict[str, Any] = {name: getattr(args, name) for name in ASKED}
    row |= {
        "benchmark": "peers",
        "model": facts.folder.name if facts.folder != CHECKPOINT else "bundled",
        "steps": race.task.steps,
        "stops": args.stops,
        "backends": sorted({peer.backend for peer in race.peers if isinstance(peer, Ours)}),
        "clock": "processor" if args.cpu_time else "wall",
        "tokens_per_s": {peer: _rounded(by) for peer, by in found.items()},
        "equal_answers": {peer: round(share, 3) for peer, share in race.equal.items()},
        "warm_between_runs": [peer.name for peer in race.peers if not peer.cold],
        "seconds": _seconds(runs),
        "load_average": [round(min(r.load for r in runs), 2), round(max(r.load for r in runs), 2)],
        "speedups": compared,
    }
    for base, key in ((OneByOne.name, "b1"), (Batched.name, "batched")):
        if base in compared and "dense" in compared[base]:
            row[f"speedup_vs_transformers_{key}"] = compared[base]["dense"]
    return row


def _seconds(runs: list[Run]) -> dict[str, dict[str, list[float]]]:
    """All times, in order."""
    found: dict[str, dict[str, list[float]]] = {}
    for run in runs:
        found.setdefault(run.peer, {}).setdefault(str(run.requests), []).append(round(run.seconds, 3))
    return found


def _ratios(mine: dict[int, float], base: dict[int, float]) -> dict[str, float]:
    return {str(count): round(speed / base[count], 2) for count, speed in mine.items()}


def _rounded(by: dict[int, float]) -> dict[str, float]:
    return {str(count): round(speed, 2) for count, speed in by.items()}


def _table(counts: Sequence[int], race: Race, runs: list[Run]) -> Table:
    table = Table("tokens/s", *(f"{count} at once" for count in counts), "x batch 1", "answers equal")
    table.title = "visible output tokens per second, medians; x batch 1: with the most requests"
    found = speeds(runs)
    base = found[race.peers[0].name]
    for peer in race.peers:
        mine = found[peer.name]
        cells = [f"{mine[count]:,.1f}" for count in counts]
        most = max(counts)
        table.add_row(peer.name, *cells, f"{mine[most] / base[most]:.2f}", f"{race.equal[peer.name]:.0%}")
    return table


def _parser() -> argparse.ArgumentParser:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=__doc__, formatter_class=formatter)
    parser.add_argument("--model", type=Path, default=CHECKPOINT, help="checkpoint folder (default: the bundled model)")
    parser.add_argument("--document", type=int, default=8192, help="tokens that all prompts share")
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 8, 32], help="requests at once")
    parser.add_argument("--output", type=int, default=32, help="most tokens of an answer")
    parser.add_argument("--stops", action="store_true", help="let answers end at EOS (default: all of the same length)")
    parser.add_argument("--steps", type=int, help="denoising steps per block (default: its length)")
    parser.add_argument("--threshold", type=float, default=0.9, help="confidence that is accepted ahead of the plan")
    parser.add_argument("--budget", type=int, default=256, help="LoSA's prefix tokens per query")
    parser.add_argument("--variants", nargs="*", choices=list(VARIANTS), default=list(VARIANTS), help="of this runtime")
    others = [name for name in BASELINES if name != OneByOne.name]
    parser.add_argument("--baselines", nargs="*", choices=others, default=others, help="beside the batch-1 loop")
    parser.add_argument("--server", action="append", default=[], metavar="KIND=URL", help="a server to compare with")
    parser.add_argument("--server-fields", metavar="JSON", help="further fields of every body sent to servers")
    parser.add_argument("--server-key", metavar="KEY", help="sent to servers as a bearer token")
    parser.add_argument("--rounds", type=int, default=3, help="timed runs of everyone")
    parser.add_argument("--sample", type=int, default=4, help="most prompts over which the batch-1 loop is timed")
    parser.add_argument(
        "--cpu-time", action="store_true", help="the processor's seconds: with one thread, whatever else runs"
    )
    parser.add_argument("--threads", type=int, default=2, help="of torch, for all in this process")
    parser.add_argument(
        "--results", type=Path, help="also add the row, with machine, versions and commit, to this file"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
