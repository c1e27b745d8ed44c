"""The drills. Each starts a server of its own on the bundled model, does its worst, and returns figures."""

from __future__ import annotations

import contextlib
import random
import signal
import threading
import time
from collections.abc import Callable

import httpx
import psutil

from benchmarks.drills.clients import Clients, Ending
from benchmarks.drills.figures import Figure
from benchmarks.drills.memory import memory
from benchmarks.drills.world import MODEL, PROMPT, DrillServer, HealthWatch, until

MANY = 32
LONG = {"text": PROMPT, "sampling_params": {"temperature": 0, "max_new_tokens": 4000, "ignore_eos": True}}


def _told(endings: list[Ending], count: int) -> list[Figure]:
    return [
        Figure("clients that still wait", count - len(endings), 0),
        Figure("clients not told exactly once", sum(not ending.proper for ending in endings), 0),
        Figure("answers that are neither 200 nor 503", sum(e.status not in (200, 503) for e in endings), 0),
    ]


def _lose_engine(lose: Callable[[psutil.Process], None], health_s: float, clients_s: float) -> list[Figure]:
    """Lose the engine with 32 clients waiting, and see another take over."""
    with DrillServer(MODEL) as server, HealthWatch(server.url) as watch:
        _, before = server.ask()
        clients = Clients(server.url, MANY, LONG)
        [engine] = server.engines()
        lost = time.monotonic()
        lose(engine)
        unhealthy_s = watch.first(503, lost, 30)
        endings = clients.join(30)
        ready_s = watch.first(200, lost + unhealthy_s, 60) + unhealthy_s
        status, after = server.ask()
        return [
            Figure("health says so after_s", unhealthy_s, health_s),
            Figure("last client told after_s", max((e.at - lost for e in endings), default=99.0), clients_s),
            Figure("another engine ready after_s", ready_s, 10 + health_s),
            *_told(endings, MANY),
            Figure("engines too many", len(server.engines()) - 1, 0),
            Figure("old engine still there", int(engine.is_running()), 0),
            Figure("other text than before", int(status != 200 or after != before), 0),
            Figure("requests left behind", server.state()["live_requests"], 0),
        ]


def kill_engine() -> list[Figure]:
    """`kill -9` of the engine."""
    return _lose_engine(lambda engine: engine.kill(), health_s=1.0, clients_s=2.0)


def stop_engine() -> list[Figure]:
    """SIGSTOP of the engine: it is there and says nothing."""
    return _lose_engine(lambda engine: engine.suspend(), health_s=5.0, clients_s=6.0)


def restart_budget() -> list[Figure]:
    """`kill -9` of every engine that comes up: the fourth within a minute is the last."""
    with DrillServer(MODEL) as server:
        killed = 0
        began = time.monotonic()
        while server.process.is_running() and server.server.process.poll() is None and killed < 10:
            if not server.healthy():
                time.sleep(0.01)
                continue
            for engine in server.engines():
                engine.kill()
                killed += 1
            until(lambda: not server.healthy(), 10)
        code = server.server.process.wait(30)
        return [
            Figure("engines killed", killed, 4),
            Figure("ended after_s", time.monotonic() - began, 60),
            Figure("exit code that says nothing of it", int(code != 1), 0),
            Figure("processes left", sum(p.is_running() for p in server.tree()), 0),
            Figure("files left", len(server.left_over()), 0),
        ]


def _kill_http(stopped: bool) -> list[Figure]:
    with DrillServer(MODEL) as server:
        clients = Clients(server.url, MANY, LONG)
        tree = server.tree()
        if stopped:
            server.engines()[0].suspend()
        server.process.kill()
        gone_s = until(lambda: not any(_alive(process) for process in tree), 20)
        files_s = until(lambda: not server.left_over(), 20)
        endings = clients.join(10)
        return [
            Figure("engine gone after_s", gone_s, 2),
            Figure("files gone after_s", files_s, 2),
            Figure("processes left", sum(_alive(process) for process in tree), 0),
            Figure("files left", len(server.left_over()), 0),
            Figure("clients that still wait", MANY - len(endings), 0),
        ]


def _alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def kill_http() -> list[Figure]:
    """`kill -9` of the HTTP process under load."""
    return _kill_http(stopped=False)


def kill_http_of_stopped_engine() -> list[Figure]:
    """`kill -9` of the HTTP process while the engine is stopped."""
    return _kill_http(stopped=True)


def drain() -> list[Figure]:
    """SIGTERM with 32 requests on their way, every second one a stream, and others that keep coming."""
    body = {"text": PROMPT, "sampling_params": {"temperature": 0, "max_new_tokens": 96, "ignore_eos": True}}
    with DrillServer(MODEL, "--drain-timeout", "240") as server:
        clients = Clients(server.url, MANY, body)
        # Endings are counted first: one that ends in between is then missing, not counted twice.
        until(lambda: len(clients.endings) + server.state()["live_requests"] == MANY, 60)
        under_way = clients.waiting
        server.process.send_signal(signal.SIGTERM)
        began = time.monotonic()
        until(lambda: not server.healthy(), 30)
        refuses_s = time.monotonic() - began
        refused: list[httpx.Response] = []
        try:
            while True:
                for path in ("/health", "/ready"):
                    refused.append(server.http.get(f"{server.url}{path}"))
                refused.append(server.http.post(f"{server.url}/generate", json={"text": "x"}))
                time.sleep(0.05)
        except httpx.TransportError:
            pass
        code = server.server.process.wait(240)
        endings = clients.join(10)
        proper = [r for r in refused if r.status_code == 503 and "retry-after" in r.headers]
        return [
            Figure("requests under way", under_way),
            Figure("none was under way", int(not under_way), 0),
            Figure("accepted requests lost", sum(e.failed for e in endings) + MANY - len(endings), 0),
            Figure("refuses after_s", refuses_s, 1),
            Figure("latecomers not refused with 503 and Retry-After", len(refused) - len(proper), 0),
            Figure("latecomers", len(refused)),
            Figure("none of them was answered", int(not refused), 0),
            Figure("drained after_s", time.monotonic() - began, 25),
            Figure("exit code not 0", int(code != 0), 0),
            Figure("processes left", sum(p.is_running() for p in server.tree()), 0),
            Figure("files left", len(server.left_over()), 0),
        ]


def disconnects(count: int = 1000, at_once: int = 16) -> list[Figure]:
    """Clients that leave after 0 to 0.3 s, streaming or not; one who stays gets the same text as before."""
    with DrillServer(MODEL) as server:
        _, before = server.ask()
        server.server.post("/tokenize", {"text": PROMPT})
        threads = [process.num_threads() for process in (server.process, *server.engines())]
        files = [process.num_fds() for process in (server.process, *server.engines())]
        numbers = iter(range(count))
        lock, seed = threading.Lock(), random.Random(0)

        def leave() -> None:
            while True:
                with lock:
                    number, stay_s = next(numbers, None), seed.uniform(0.002, 0.3)
                if number is None:
                    return
                _leave(server, number, stay_s)

        workers = [threading.Thread(target=leave) for _ in range(at_once)]
        began = time.monotonic()
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        storm_s = time.monotonic() - began
        left = time.monotonic()
        state = server.state()
        while (state["running"] or state["waiting"] or state["live_requests"]) and time.monotonic() - left < 30:
            state = server.state()
        free_s = time.monotonic() - left
        status, after = server.ask()
        held = state["pages_total"] - state["pages_free"] - state["pages_evictable"]
        time.sleep(1.0)
        now = [process.num_threads() for process in (server.process, *server.engines())]
        open_now = [process.num_fds() for process in (server.process, *server.engines())]
        return [
            Figure("clients that left", count),
            Figure("the storm_s", storm_s),
            Figure("all free after_s", free_s, 0.25),
            Figure("requests left behind", state["running"] + state["waiting"] + state["live_requests"], 0),
            Figure("pages held by nobody", held, 0),
            Figure("other text than before", int(status != 200 or after != before), 0),
            Figure("threads more than before", max(a - b for a, b in zip(now, threads, strict=True)), 2),
            Figure("open files more than before", max(a - b for a, b in zip(open_now, files, strict=True)), 2),
        ]


def _leave(server: DrillServer, number: int, stay_s: float) -> None:
    body = {**LONG, "text": f"{number % 7} {PROMPT}", "stream": number % 2 == 0}
    timeout = httpx.Timeout(30, read=stay_s)
    with (
        contextlib.suppress(httpx.TransportError),
        server.http.stream("POST", f"{server.url}/generate", json=body, timeout=timeout) as reply,
    ):
        next(reply.iter_raw())


def overload(seconds: float = 15.0, per_second: float = 60.0) -> list[Figure]:
    """Calls come at a steady pace, far more than can be served; a queue of 8 keeps the rest out."""
    options = ("--max-running-requests", "4", "--max-queued-requests", "8")
    body = {"text": PROMPT, "sampling_params": {"temperature": 0, "max_new_tokens": 64, "ignore_eos": True}}
    with DrillServer(MODEL, *options) as server:
        server.ask()
        done: list[tuple[int, float, bool]] = []
        longest: list[int] = []

        def call() -> None:
            began = time.monotonic()
            try:
                reply = server.http.post(f"{server.url}/generate", json=body)
                done.append((reply.status_code, time.monotonic() - began, "retry-after" in reply.headers))
            except httpx.TransportError:
                done.append((0, time.monotonic() - began, False))

        threads, began = [], time.monotonic()
        while (now := time.monotonic() - began) < seconds:
            if len(threads) <= now * per_second:
                threads.append(threading.Thread(target=call, daemon=True))
                threads[-1].start()
                if len(threads) % 50 == 0:
                    longest.append(server.state()["waiting"])
            time.sleep(0.002)
        for thread in threads:
            thread.join(120)
        refusals = sorted(took for status, took, _ in done if status == 503)
        normal_s = until(lambda: server.ask()[0] == 200, 20)
        return [
            Figure("calls", len(threads)),
            Figure("served", sum(status == 200 for status, _, _ in done)),
            Figure("refused", len(refusals)),
            Figure("refusals without Retry-After", sum(s == 503 and not again for s, _, again in done), 0),
            Figure("answers that are neither 200 nor 503", sum(s not in (200, 503) for s, _, _ in done), 0),
            Figure("longest queue", max(longest, default=0), 8),
            Figure("half of the refusals within_s", refusals[len(refusals) // 2] if refusals else 99.0),
            Figure("99 % of the refusals within_s", refusals[len(refusals) * 99 // 100] if refusals else 99.0, 0.05),
            Figure("normal again after_s", normal_s, 5),
        ]


DRILLS: dict[str, Callable[[], list[Figure]]] = {
    drill.__name__: drill
    for drill in (
        kill_engine,
        stop_engine,
        restart_budget,
        kill_http,
        kill_http_of_stopped_engine,
        drain,
        disconnects,
        overload,
        memory,
    )
}
