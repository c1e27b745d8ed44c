"""What is measured: cells, each a load test with its settings, and the servers for them. Runs nothing."""

from __future__ import annotations

from typing import Any, NamedTuple

from losa_server.bench.settings import BenchSettings

# A fixed number of steps, as the bundled model is sure of most tokens at once and would leave no later steps.
DECODING = ("--algorithm", "low_confidence_static")
SLO = {"slo_ttft_ms": 2000.0, "slo_block_ms": 1000.0}
METHODS = ("dense", "losa:256")
GROWTH_METHODS = ("dense", "losa:512")


class Cell(NamedTuple):
    """One measurement. labels: the first keys of its row, none of which is a key of what is measured.

    primed: the document is read before the clock starts.
    """

    labels: dict[str, Any]
    settings: BenchSettings
    primed: bool = False


class Stand(NamedTuple):
    """A server, by its options, and what is measured on it, in this order."""

    options: tuple[str, ...]
    cells: tuple[Cell, ...]


def workloads(share: float = 1.0) -> list[Stand]:
    """A cell per workload and method. share: of the requests of each."""

    def cell(name: str, method: str, **given: Any) -> Cell:
        given["num_prompts"] = max(2, round(share * given["num_prompts"]))
        if given["workload"] != "programs":
            given.setdefault("request_methods", (method,))
        settings = BenchSettings(warmup_requests=1, flush_cache=True, **given)
        return Cell({"benchmark": "load", "name": name, "method": method}, settings)

    def document(**given: Any) -> dict[str, Any]:
        base = {"workload": "shared-prefix", "prefix_groups": 1, "prefix_len": 4096, "random_input_len": 64}
        return {**base, "random_output_len": 32, "num_prompts": 48, "max_concurrency": 16, **given}

    kinds: dict[str, dict[str, Any]] = {
        "one document": document(prefix_len=8192, max_concurrency=32, num_prompts=32),
        "questions": document(workload="questions", prefix_groups=2, turns=4, num_prompts=8, max_concurrency=4),
        "chat": document(workload="chat", prefix_len=512, turns=4, num_prompts=8, max_concurrency=8),
        "few-shot": document(workload="few-shot", prefix_len=2048, prefix_groups=4),
        "disjoint": document(workload="random", random_input_len=4096, num_prompts=8, max_concurrency=8),
        "Poisson": document(request_rate=6.0, max_concurrency=None, num_prompts=32, **SLO),
        "bursts": document(request_rate=6.0, burst_size=16, max_concurrency=None, num_prompts=32, **SLO),
        "hang-ups": document(abort_share=0.3, num_prompts=32),
    }
    cells = [cell(name, method, **given) for name, given in kinds.items() for method in METHODS]
    programs = document(
        workload="programs", prefix_len=2048, prefix_groups=2, turns=3, num_prompts=8, max_concurrency=4
    )
    cells.append(cell("SGLang programs", "losa:256", **programs))
    mixed = {
        **document(workload="mixed-lengths", random_input_len=32000, num_prompts=12, max_concurrency=6),
        "request_methods": ("dense", "quest:512", "losa:256", "losa:1024", "losa_plus:128"),
    }
    cells.append(cell("mixed lengths", "mixed", **mixed))
    options = ("--sparse-method", "losa", "--token-budget", "256", "--denoising-steps", "8")
    return [Stand((*DECODING, *options, "--max-total-tokens", "262144"), tuple(cells))]


CONTEXTS = (256, 512, 1024, 2048, 4096, 8192, 16384, 32256)
CONCURRENCIES = (1, 4, 8, 16, 32, 64)
BUDGETS = (64, 128, 256, 512, 1024, 2048, 4096)
BLOCK_LENGTHS = (4, 8, 16, 32, 64)
AXES = {
    "context": "prompt tokens",
    "concurrency": "requests at once",
    "budget": "LoSA's budget in tokens",
    "block_length": "positions per block",
}
BASE = {"context": 8192, "concurrency": 8, "budget": 512, "block_length": 16}


def growth(contexts: tuple[int, ...] = CONTEXTS) -> list[Stand]:
    """One axis at a time from `BASE`: as many steps as the block has positions, two blocks of output per request.

    All documents are beginnings of one, so that each is read once; reading is not part of the measurement.
    """
    places = [("context", context) for context in contexts]
    places += [("concurrency", n) for n in CONCURRENCIES]
    cells = [_grown(axis, value, method) for axis, value in places for method in GROWTH_METHODS]
    longer = 16384 if 16384 in contexts else max(contexts)
    cells += [_grown("budget", budget, f"losa:{budget}", context=longer) for budget in BUDGETS if budget < longer]
    options = (
        *DECODING,
        "--sparse-methods",
        "dense,losa",
        "--max-total-tokens",
        "81920",
        "--max-running-requests",
        "64",
    )
    stands = [Stand(options, tuple(cells))]
    for length in BLOCK_LENGTHS:
        more = tuple(_grown("block_length", length, method) for method in GROWTH_METHODS)
        stands.append(Stand((*options, "--block-length", str(length)), more))
    return stands


def _grown(axis: str, value: int, method: str, **other: int) -> Cell:
    at = {**BASE, **other, axis: value}
    settings = BenchSettings(
        workload="shared-prefix",
        prefix_groups=1,
        prefix_len=at["context"],
        random_input_len=32,
        random_output_len=2 * max(16, at["block_length"]),
        num_prompts=at["concurrency"],
        max_concurrency=at["concurrency"],
        request_methods=(method,),
        custom_params={} if method == "dense" else {"active_ratio": 5 / 16},
        warmup_requests=0,
    )
    labels = {"benchmark": "growth", "axis": axis, "value": value, "at": at, "method": method}
    return Cell(labels, settings, primed=True)
