"""What a load test consists of. SGLang's names, as in its bench_serving, where the meaning is the same."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from losa_runtime.core.options import option

LOAD = "load"
WORKLOAD = "workload"
OUTPUT = "output"


class BenchSettings(BaseModel):
    """request_rate: inf is a closed loop, in which an answer makes room for the next request; anything else an open
    loop, whose arrivals do not care how the server is doing."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    request_rate: float = option(
        math.inf, LOAD, "arrivals per second at random (Poisson); inf: as fast as --max-concurrency allows", gt=0
    )
    max_concurrency: int | None = option(
        None, LOAD, "programs at once (default: 8 in a closed loop, no limit with a rate)", gt=0
    )
    warmup_requests: int = option(2, LOAD, "programs before the measurement", ge=0)
    flush_cache: bool = option(False, LOAD, "forget cached prefixes after the warm-up")
    timeout_s: float = option(600.0, LOAD, "seconds that an answer may be silent", gt=0)

    workload: Literal["random", "shared-prefix"] = option("random", WORKLOAD, "what is sent")
    num_prompts: int = option(32, WORKLOAD, "how many programs", gt=0)
    random_input_len: int = option(256, WORKLOAD, "longest prompt in tokens", gt=0)
    random_output_len: int = option(64, WORKLOAD, "longest answer in tokens", gt=0)
    random_range_ratio: float = option(1.0, WORKLOAD, "shortest length as a share of the longest", ge=0, le=1)
    prefix_len: int = option(1024, WORKLOAD, "shared-prefix: tokens before each prompt", gt=0)
    prefix_groups: int = option(4, WORKLOAD, "shared-prefix: how many different ones", gt=0)
    temperature: float = option(0.0, WORKLOAD, "0 is greedy", ge=0)
    disable_ignore_eos: bool = option(False, WORKLOAD, "let answers end by themselves")
    vocab_size: int | None = option(
        None, WORKLOAD, "ids that prompts are made of (default: what the server says)", gt=1
    )
    seed: int = option(1, WORKLOAD, "equal seeds send equal prompts at equal times")

    output_file: Path | None = option(None, OUTPUT, "append the result as a line of JSON", metavar="FILE")
    output_details: bool = option(False, OUTPUT, "with each request's lengths and times in that line")

    @property
    def concurrency(self) -> int | None:
        """Programs at once; None without a limit."""
        return self.max_concurrency or (8 if math.isinf(self.request_rate) else None)
