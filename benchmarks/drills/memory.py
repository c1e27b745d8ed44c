"""Does a server keep growing? Many small calls of all kinds, and a line through what its processes hold meanwhile."""

from __future__ import annotations

import http.client
import json
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from benchmarks.drills.figures import Figure
from benchmarks.drills.world import MODEL, DrillServer

EVERY = 1000  # calls between two looks
WARM_UP = 0.3  # share of the calls after which caches, pools and the allocator have what they need
ONE_STEP = {"algorithm": "low_confidence_static", "denoising_steps": 1}
ONE_BLOCK = {"temperature": 0, "max_new_tokens": 4, "custom_params": ONE_STEP}
OPENAI = {"max_tokens": 4, "temperature": 0, **ONE_STEP}
RENEW = 50  # calls after which a client opens another connection


def _calls(number: int) -> tuple[str, dict[str, Any], int]:
    """(path, body, status that it must get). Prompts differ, so that the prefix cache turns over."""
    text = f"{number * 7919 % 99991} The secret code of the red fox is {number % 10000:04d}."
    messages = [{"role": "user", "content": text}]
    kinds: tuple[tuple[str, dict[str, Any], int], ...] = (
        ("/generate", {"text": text, "sampling_params": ONE_BLOCK}, 200),
        ("/generate", {"text": text, "sampling_params": ONE_BLOCK, "stream": True, "return_logprob": True}, 200),
        ("/v1/completions", {"prompt": text, "user": f"user-{number}", **OPENAI}, 200),
        ("/v1/chat/completions", {"messages": messages, "stream": True, **OPENAI}, 200),
        ("/tokenize", {"prompt": text}, 200),
        ("/detokenize", {"tokens": [300 + number % 900, 301]}, 200),
        ("/abort_request", {"rid": f"nobody-{number}"}, 200),
        ("/generate", {"text": text, "sampling_params": {"top_p": 1 + number}}, 400),
        ("/v1/completions", {"prompt": text, "model": f"model-{number}"}, 404),
        (f"/nothing/{number}", {}, 404),
    )
    return kinds[number % len(kinds)]


class _Crowd:
    """Clients that share `count` calls; rss: KiB of each process, one list for each look."""

    def __init__(self, server: DrillServer, count: int) -> None:
        self.wrong: list[str] = []
        self.rss: list[list[float]] = []
        self._port, self._processes = server.server.port, [server.process, *server.engines()]
        self._numbers: Iterator[int] = iter(range(count))
        self._lock = threading.Lock()

    def run(self, at_once: int) -> None:
        threads = [threading.Thread(target=self._work, daemon=True) for _ in range(at_once)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _next(self) -> int | None:
        with self._lock:
            number = next(self._numbers, None)
            if number is not None and number % EVERY == 0:
                self.rss.append([process.memory_info().rss / 1024 for process in self._processes])
            return number

    def _work(self) -> None:
        while True:
            connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=120)
            for _ in range(RENEW):
                number = self._next()
                if number is None:
                    return connection.close()
                self._call(connection, number)
            connection.close()

    def _call(self, connection: http.client.HTTPConnection, number: int) -> None:
        path, body, status = _calls(number)
        connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
        reply = connection.getresponse()
        text = reply.read()
        if reply.status != status:
            self.wrong.append(f"{path}: {reply.status}: {text[:200]!r}")


def growth(rss: Sequence[float]) -> float:
    """Slope of the least-squares line behind the warm-up, per look."""
    tail = np.asarray(rss[int(len(rss) * WARM_UP) :])
    return float(np.polyfit(np.arange(len(tail)), tail, 1)[0])


def memory(count: int = 50_000, at_once: int = 16) -> list[Figure]:
    """Small calls of ten kinds, answered and refused: resident memory per 1,000 of them, once warm."""
    with DrillServer(MODEL, "--log-level", "warning") as server:
        crowd = _Crowd(server, count)
        crowd.run(at_once)
        state = server.state()
        front, engine = ([look[i] for look in crowd.rss] for i in range(2))
        return [
            Figure("calls", count),
            Figure("answers with another status than expected", len(crowd.wrong), 0),
            Figure("HTTP process, per 1,000 calls_kib", growth(front), 20),
            Figure("HTTP process, at the end_kib", front[-1]),
            Figure("engine, per 1,000 calls_kib", growth(engine), 100),
            Figure("engine, at the end_kib", engine[-1]),
            Figure("requests left behind", state["live_requests"], 0),
        ]
