"""This runtime in the same process, with its parts switched on and off. Knows its public face only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.peers.peer import Answer, Peer, Prompt, Task, common_prefix
from benchmarks.peers.workload import Facts
from losa_runtime import LLM, SamplingParams
from losa_runtime.core.sampling_params import DiffusionParams

SLACK = 128  # tokens: whole blocks and pages at both ends
# name -> options of the engine
VARIANTS: dict[str, dict[str, Any]] = {
    "dense": {},
    "losa": {"sparse_method": "losa"},
    "radix_off": {"disable_radix_cache": True},
    "batching_off": {"max_running_requests": 1},
}


class Ours(Peer):
    """One of `VARIANTS`. room: tokens of the page pool. LoSA's answers may differ: it reads less."""

    def __init__(self, variant: str, facts: Facts, most: int, room: int, budget: int) -> None:
        self.name = variant
        self.exact = variant != "losa"
        options = {"max_running_requests": most, "max_total_tokens": room} | VARIANTS[variant]
        if variant == "losa":
            options["token_budget"] = budget
        self.llm = LLM(model=str(facts.folder), **options)
        self.backend = type(self.llm.engine.parts.runner.backend).__name__

    def reset(self) -> None:
        flushed = self.llm.engine.flush_cache()
        assert flushed, "a run has left requests behind"

    def answer(self, prompts: Sequence[Prompt], task: Task) -> list[Answer]:
        params = SamplingParams(
            temperature=0.0,
            max_new_tokens=task.max_new_tokens,
            ignore_eos=task.ignore_stops,
            custom_params=DiffusionParams(
                algorithm="low_confidence_dynamic", threshold=task.threshold, denoising_steps=task.steps
            ),
        )
        found = self.llm.generate([list(prompt) for prompt in prompts], params)
        failed = [one.finish.message for one in found if one.finish.type == "error"]
        if failed:
            raise RuntimeError(f"{self.name}: {failed[0]}")
        return [Answer(len(one.token_ids), one.token_ids, one.text) for one in found]


def room_for(prompts: Sequence[Prompt], task: Task, shared: bool) -> int:
    """Tokens of a page pool that holds all prompts and their outputs at once. shared: what all begin with, once."""
    common = min(common_prefix(prompts[0], prompt) for prompt in prompts) if shared else 0
    own = [len(prompt) - common + task.max_new_tokens + SLACK for prompt in prompts]
    return common + SLACK + sum(own)
