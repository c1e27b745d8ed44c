"""What a load test consists of. SGLang's names, as in its bench_serving, where the meaning is the same."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, field_validator, model_validator

from losa_runtime.core.options import option

LOAD = "load"
WORKLOAD = "workload"
SLO = "service level (a request is good if it keeps all that are given)"
OUTPUT = "output"


class BenchSettings(BaseModel):
    """request_rate: inf is a closed loop, in which an answer makes room for the next request; anything else an open
    loop, whose arrivals do not care how the server is doing."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    request_rate: float = option(
        math.inf, LOAD, "arrivals per second at random (Poisson); inf: as fast as --max-concurrency allows", gt=0
    )
    burst_size: int = option(1, LOAD, "so many arrive together, at the same rate", gt=0)
    max_concurrency: int | None = option(
        None, LOAD, "programs at once (default: 8 in a closed loop, no limit with a rate)", gt=0
    )
    warmup_requests: int = option(2, LOAD, "programs before the measurement", ge=0)
    flush_cache: bool = option(False, LOAD, "forget cached prefixes after the warm-up")
    timeout_s: float = option(600.0, LOAD, "seconds that an answer may be silent", gt=0)

    workload: Literal["random", "shared-prefix", "few-shot", "questions", "chat", "mixed-lengths", "programs"] = option(
        "random", WORKLOAD, "what is sent"
    )
    num_prompts: int = option(32, WORKLOAD, "how many programs", gt=0)
    random_input_len: int = option(256, WORKLOAD, "longest prompt in tokens", gt=0)
    random_output_len: int = option(64, WORKLOAD, "longest answer in tokens", gt=0)
    random_range_ratio: float = option(1.0, WORKLOAD, "shortest length as a share of the longest", ge=0, le=1)
    prefix_len: int = option(1024, WORKLOAD, "tokens before each prompt, where there is something in common", gt=0)
    prefix_groups: int = option(4, WORKLOAD, "how many different ones", gt=0)
    turns: int = option(3, WORKLOAD, "chat: turns; questions, programs: questions per document", gt=0)
    abort_share: float = option(0.0, WORKLOAD, "share of calls whose client hangs up before the end", ge=0, le=1)
    request_methods: tuple[str, ...] = option(
        (), WORKLOAD, "sparse methods drawn per call, with or without a budget: dense,losa:256", metavar="A,B:N,…"
    )
    custom_params: dict[str, bool | int | float | str] = option(
        {}, WORKLOAD, "sent with each call, e.g. '{\"denoising_steps\": 8}'"
    )
    temperature: float = option(0.0, WORKLOAD, "0 is greedy", ge=0)
    disable_ignore_eos: bool = option(False, WORKLOAD, "let answers end by themselves")
    vocab_size: int | None = option(
        None, WORKLOAD, "ids that prompts are made of (default: what the server says)", gt=1
    )
    seed: int = option(1, WORKLOAD, "equal seeds send equal prompts at equal times")

    slo_ttft_ms: float | None = option(None, SLO, "until the first block", gt=0)
    slo_block_ms: float | None = option(None, SLO, "from block to block, mean of a request", gt=0)
    slo_e2e_ms: float | None = option(None, SLO, "until the end", gt=0)

    output_file: Path | None = option(None, OUTPUT, "append the result as a line of JSON", metavar="FILE")
    output_details: bool = option(False, OUTPUT, "with each request's lengths and times in that line")

    @property
    def concurrency(self) -> int | None:
        """Programs at once; None without a limit."""
        return self.max_concurrency or (8 if math.isinf(self.request_rate) else None)

    @field_validator("request_methods")
    @classmethod
    def _budgets_are_numbers(cls, values: tuple[str, ...]) -> tuple[str, ...]:
        for value in values:
            name, colon, budget = value.partition(":")
            if not name or (colon and not budget.isdigit()):
                raise ValueError(f"{value!r}: allowed: a method, or a method, a colon and a number of tokens")
        return values

    @model_validator(mode="after")
    def _nothing_is_ignored(self) -> Self:
        if self.burst_size > 1 and math.isinf(self.request_rate):
            raise ValueError("--burst-size needs a --request-rate: in a closed loop nothing arrives by itself")
        if self.output_details and self.output_file is None:
            raise ValueError("--output-details needs an --output-file to write them to")
        return self

    def method_params(self, word: str) -> dict[str, object]:
        """One of `request_methods` as parameters of a request."""
        name, _, budget = word.partition(":")
        return {"sparse_method": name, **({"token_budget": int(budget)} if budget else {})}
