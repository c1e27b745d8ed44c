"""Two thousand requests through a whole server, two fifths of them left or aborted at any moment, on far too few pages.

With figures. Nothing may stay behind, and who is not disturbed must not notice: the tokens are those of a calm run.
"""

from __future__ import annotations

import asyncio
import gc
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import orjson
import pytest

from benchmarks.drills.clients import new_http
from losa_runtime import LLM, SamplingParams
from losa_runtime.core.config import EngineConfig
from losa_runtime.core.sampling_params import DiffusionParams
from losa_runtime.engine import Engine
from losa_runtime.sparse.method import METHODS, method_class
from tests.engine.leftovers import leftovers
from tests.server.app_server import AppServer

REQUESTS, AT_ONCE, SAMPLE = 2000, 32, 60
DISTURBED = 0.4
DOCUMENTS = [[66 + (7 * i * (d + 1) + d) % 150 for i in range(160)] for d in range(12)]
OPTIONS: dict[str, Any] = {"deterministic": True, "debug_poison_pages": True, "show_progress": False}


class Job(NamedTuple):
    """One call. how: `stay`, or how it is disturbed; after_s: when."""

    number: int
    prompt: list[int]
    params: SamplingParams
    stream: bool
    how: str
    after_s: float


def job(number: int) -> Job:
    """Always the same for a number."""
    dice = random.Random(number)
    document = DOCUMENTS[min(dice.randrange(16), 11)]
    prompt = document[: dice.randrange(5, 150)] + [66 + dice.randrange(150) for _ in range(dice.randrange(20))]
    method = dice.choice(list(METHODS))
    budget: dict[str, Any] = {"token_budget": dice.choice([16, 48])} if method_class(method).has_budget else {}
    custom = DiffusionParams(
        sparse_method=method, algorithm="low_confidence_static", denoising_steps=dice.choice([2, 4]), **budget
    )
    params = SamplingParams(
        temperature=dice.choice([0.0, 0.8]),
        sampling_seed=number,
        max_new_tokens=dice.choice([0, 3, 20, 60, 120]),
        ignore_eos=dice.random() < 0.8,
        custom_params=custom,
    )
    how = dice.choice(["at once", "later", "first news", "abort"]) if dice.random() < DISTURBED else "stay"
    return Job(number, prompt, params, dice.random() < 0.5 or how == "first news", how, dice.uniform(0.0, 1.0))


class Crowd:
    """Clients that share the jobs. answers: output ids of those that stayed, by number; ends: what became of all."""

    def __init__(self, url: str) -> None:
        self.url, self.http = url, new_http()
        self.answers: dict[int, list[int]] = {}
        self.ends: Counter[str] = Counter()
        self._jobs = iter(range(REQUESTS))
        self._lock = threading.Lock()

    def run(self) -> None:
        """All jobs, to their end."""
        threads = [threading.Thread(target=self._work) for _ in range(AT_ONCE)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _work(self) -> None:
        while True:
            with self._lock:
                number = next(self._jobs, None)
            if number is None:
                return
            try:
                end = self._call(job(number))
            except httpx.ReadTimeout:
                end = "left"
            except httpx.TransportError as error:
                end = f"broken: {error!r}"
            with self._lock:
                self.ends[end] += 1

    def _call(self, job: Job) -> str:
        body = {
            "input_ids": job.prompt,
            "sampling_params": job.params.model_dump(mode="json", exclude_defaults=True),
            "rid": f"job-{job.number}-",
            "stream": job.stream,
        }
        patience = {"at once": 0.001, "later": job.after_s + 0.001}.get(job.how, 120.0)
        timer = threading.Timer(job.after_s, self._abort, (job.number,))
        if job.how == "abort":
            timer.start()
        try:
            timeout = httpx.Timeout(30, read=patience)
            with self.http.stream("POST", f"{self.url}/generate", json=body, timeout=timeout) as reply:
                if reply.status_code != 200:
                    return f"status {reply.status_code}: {reply.read()!r}"
                if job.how == "first news":
                    next(reply.iter_lines())
                    return "left"
                return self._read(job, reply)
        finally:
            timer.cancel()

    def _read(self, job: Job, reply: httpx.Response) -> str:
        lines = reply.read().split(b"\n\n")  # iter_lines would also split at characters inside a text
        if job.stream:
            assert lines[-2:] == [b"data: [DONE]", b""]
            lines = [line.removeprefix(b"data: ") for line in lines[:-2]]
        events = [orjson.loads(line) for line in lines]
        ends = [event["meta_info"]["finish_reason"] for event in events]
        assert [end is None for end in ends] == [True] * (len(ends) - 1) + [False], "exactly one ending"
        kind: str = ends[-1]["type"]
        if kind in ("length", "stop"):
            self.answers[job.number] = events[-1]["output_ids"]
            return "finished"
        return kind

    def _abort(self, number: int) -> None:
        self.http.post(f"{self.url}/abort_request", json={"rid": f"job-{number}-"})


async def tasks() -> int:
    return len(asyncio.all_tasks())


def in_use(server: AppServer) -> dict[str, int]:
    gc.collect()
    return {
        "threads": threading.active_count(),
        "files": len(os.listdir("/proc/self/fd")),
        "tasks": server.call(tasks()),
    }


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_soak(tiny_checkpoint: Path, record: Callable[..., None]) -> None:
    config = EngineConfig(model=str(tiny_checkpoint), max_total_tokens=720, **OPTIONS)
    engine = Engine(config)
    with AppServer(str(tiny_checkpoint), engine=engine) as server:
        crowd = Crowd(server.url)
        assert crowd.http.get(f"{server.url}/health").status_code == 200
        before, began = in_use(server), time.monotonic()
        crowd.run()
        seconds, idle = time.monotonic() - began, time.monotonic()
        while (server.manager.live or engine.has_work()) and time.monotonic() - idle < 30:
            time.sleep(0.01)
        settled_s = time.monotonic() - idle
        time.sleep(0.5)
        left = {**leftovers(engine), "mailboxes": len(server.client._mailboxes), "generations": server.manager.live}
        crowd.http.close()
        time.sleep(1.0)
        more = {name: count - before[name] for name, count in in_use(server).items()}
        stats = engine.stats()
        assert engine.flush_cache() and engine.parts.cache.pool.free == engine.parts.cache.pool.num_pages
    calm = LLM(str(tiny_checkpoint), max_total_tokens=8192, **OPTIONS)
    chosen = random.Random(1).sample(sorted(crowd.answers), SAMPLE)
    other = [
        number
        for number in chosen
        if list(calm.generate([job(number).prompt], job(number).params)[0].token_ids) != crowd.answers[number]
    ]
    record(
        "soak",
        requests=REQUESTS,
        at_once=AT_ONCE,
        seconds=round(seconds, 1),
        ends=dict(crowd.ends),
        retractions=stats["retractions"],
        pages_evicted=stats["pages_evicted"],
        settled_s=round(settled_s, 3),
        left_behind=left,
        more_than_before=more,
        texts_compared=SAMPLE,
        other_texts=len(other),
    )
    assert set(crowd.ends) <= {"finished", "left", "abort"}, crowd.ends
    assert sum(crowd.ends.values()) == REQUESTS and crowd.ends["left"] > 300 and crowd.ends["abort"] > 20
    assert int(str(stats["retractions"])) >= 50 and int(str(stats["pages_evicted"])) >= 500
    assert set(left.values()) == {0}
    assert all(count <= 2 for count in more.values()), more
    assert settled_s < 5
    assert other == []
