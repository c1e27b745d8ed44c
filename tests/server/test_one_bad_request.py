"""A request that makes the model raise, or whose numbers go bad, beside others: real processes, the bundled model."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from tests.server.faulty_engine_process import BREAKS, RAISES
from tests.server.server_process import ServerProcess

COMMAND = (sys.executable, "-m", "tests.server.faulty_engine_process")
OTHERS = 8


@pytest.fixture(scope="module")
def faulty(bundled: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    options = ("--model", bundled, "--max-total-tokens", "16384", "--debug-poison-pages", "--sparse-method", "losa")
    folder = tmp_path_factory.mktemp("faulty")
    with ServerProcess(*options, "--token-budget", "64", engine=COMMAND, tmp=folder) as server:
        server.wait_ready()
        yield server
        assert server.stop() == 0


def prompt(number: int) -> list[int]:
    return [300 + (7 * i + 31 * number) % 900 for i in range(100)]


def ask(server: ServerProcess, ids: list[int], stream: bool = False) -> tuple[int, Any]:
    params = {
        "temperature": 0,
        "max_new_tokens": 48,
        "ignore_eos": True,
        "logit_bias": {str(RAISES): -1000, str(BREAKS): -1000},
    }
    body = {"input_ids": ids, "sampling_params": params, "stream": stream}
    reply = httpx.post(f"{server.url}/generate", json=body, timeout=120)
    return reply.status_code, reply.text if stream else reply.json()


@pytest.mark.slow
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("token", "words"), [(RAISES, "failed on this request"), (BREAKS, "not finite")])
def test_the_others_do_not_notice(faulty: ServerProcess, token: int, words: str, stream: bool) -> None:
    engine = faulty.engine
    alone = [ask(faulty, prompt(i))[1]["output_ids"] for i in range(OTHERS)]
    assert httpx.post(f"{faulty.url}/flush_cache?timeout=10", timeout=20).status_code == 200
    bad = [*prompt(99)[:60], token, *prompt(99)]
    with ThreadPoolExecutor(OTHERS + 2) as pool:
        others = [pool.submit(ask, faulty, prompt(i)) for i in range(OTHERS)]
        culprits = [pool.submit(ask, faulty, bad, stream) for _ in range(2)]
        for culprit in culprits:
            status, answer = culprit.result()
            assert status == 500 and words in str(answer)
        assert [other.result()[0] for other in others] == [200] * OTHERS
        assert [other.result()[1]["output_ids"] for other in others] == alone
    assert faulty.engine == engine, "the same engine goes on"
    assert httpx.get(f"{faulty.url}/health", timeout=20).status_code == 200
    # The culprits came with the same prompt: had the first one shared what it stored, the second would have found it.
    status, answer = ask(faulty, prompt(99)[:60])
    assert status == 200 and answer["meta_info"]["cached_tokens"] <= 48
    state = httpx.get(f"{faulty.url}/server_info", timeout=20).json()["internal_states"][0]
    assert (state["running"], state["waiting"], state["live_requests"]) == (0, 0, 0)
    assert state["pages_total"] == state["pages_free"] + state["pages_evictable"]


@pytest.mark.slow
def test_bad_requests_in_a_row_do_not_end_the_engine(faulty: ServerProcess) -> None:
    engine = faulty.engine
    for number in range(12):
        assert ask(faulty, [RAISES if number % 2 else BREAKS, *prompt(number)])[0] == 500
        assert number % 4 or ask(faulty, prompt(number))[0] == 200
    assert faulty.engine == engine
