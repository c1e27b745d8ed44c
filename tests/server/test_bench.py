"""The load test: equal seeds send equal programs, the pace is kept, the figures are what the notes say."""

from __future__ import annotations

import ast
import asyncio
import json
import math
import random
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from losa_runtime.core.errors import ConfigError
from losa_server.bench.calls import Call, Caller, Piece, Program, Record
from losa_server.bench.catalogue import WORKLOADS
from losa_server.bench.client import Client, ServerUnreachable
from losa_server.bench.measure import percentile, result
from losa_server.bench.pace import closed_loop, open_loop
from losa_server.bench.run import measure
from losa_server.bench.settings import BenchSettings
from losa_server.bench.source import Tokens
from losa_server.cli import main as losa
from losa_server.commands.bench import TERMINATED
from tests.server.app_server import AppServer

TOKENS = Tokens(50, 3)


# What a program of SGLang's sends is seen only by a server: test_programs_of_sglang.
WITH_CALLS = [name for name in WORKLOADS if name != "programs"]


class Listener:
    """A caller that answers each call with the ids 7, 8, 9."""

    url, api_key = "http://nobody", None

    def __init__(self) -> None:
        self.calls, self.records = list[Call](), list[Record]()

    async def call(self, call: Call) -> Record:
        self.calls.append(call)
        return Record(len(call.prompt), call.max_new_tokens, 0.0, output_ids=[7, 8, 9])


def calls_of(settings: BenchSettings, numbers: Iterable[int]) -> list[Call]:
    listener = Listener()

    async def everything() -> None:
        workload = WORKLOADS[settings.workload](settings, TOKENS)
        for number in numbers:
            await workload.program(number)(listener)

    asyncio.run(everything())
    return listener.calls


@pytest.mark.parametrize("workload", WITH_CALLS)
def test_equal_seeds_send_equal_programs(workload: Any) -> None:
    def prompts(seed: int) -> list[Call]:
        return calls_of(BenchSettings(workload=workload, seed=seed, temperature=0.5), range(-1, 6))

    assert prompts(1) == prompts(1)
    assert prompts(1) != prompts(2)
    assert len({str(call.prompt) for call in prompts(1)}) == len(prompts(1)) >= 7


@given(ratio=st.floats(0, 1), longest=st.integers(1, 300))
def test_lengths_lie_where_they_should(ratio: float, longest: int) -> None:
    settings = BenchSettings(random_input_len=longest, random_output_len=longest, random_range_ratio=ratio)
    for call in calls_of(settings, range(3)):
        for length in (len(call.prompt), call.max_new_tokens):
            assert max(1, round(longest * ratio)) <= length <= longest
        assert all(0 <= token < 50 and token != 3 for token in call.prompt)


@pytest.mark.parametrize("workload", WITH_CALLS)
def test_what_calls_want_and_who_leaves_changes_no_prompt(workload: Any) -> None:
    plain = calls_of(BenchSettings(workload=workload, temperature=0.5), range(12))
    more = BenchSettings(
        workload=workload,
        temperature=0.5,
        abort_share=0.5,
        request_methods=("dense", "losa:64"),
        custom_params={"denoising_steps": 2},
    )
    dressed = calls_of(more, range(12))
    assert [(c.prompt, c.max_new_tokens) for c in plain] == [(c.prompt, c.max_new_tokens) for c in dressed]
    assert all(call.leave_after is None for call in plain)
    leaving = sum(call.leave_after is not None for call in dressed) / len(dressed)
    assert 0.1 < leaving < 0.9
    customs = [call.params["custom_params"] for call in dressed]
    assert all(custom["denoising_steps"] == 2 for custom in customs)
    assert {(c["sparse_method"], c.get("token_budget")) for c in customs} == {("dense", None), ("losa", 64)}
    assert all("custom_params" not in call.params for call in plain)


def test_what_would_be_ignored_is_refused() -> None:
    with pytest.raises(ValueError, match="--burst-size needs a --request-rate"):
        BenchSettings(burst_size=4)
    with pytest.raises(ValueError, match="--output-details needs an --output-file"):
        BenchSettings(output_details=True)
    BenchSettings(burst_size=4, request_rate=2.0, output_details=True, output_file=Path("x"))


@pytest.mark.parametrize("word", ["losa:", ":4", "losa:many", "losa:-4"])
def test_a_method_or_a_method_with_a_budget(word: str) -> None:
    with pytest.raises(ValueError, match="a method, a colon and a number"):
        BenchSettings(request_methods=(word,))


def test_a_conversation_holds_what_was_said() -> None:
    settings = BenchSettings(workload="chat", turns=3, prefix_len=10, prefix_groups=2, random_input_len=4)
    one, two, three = (call.prompt for call in calls_of(settings, [0]))
    assert isinstance(one, list) and isinstance(two, list) and isinstance(three, list)
    assert two[: len(one) + 3] == [*one, 7, 8, 9] and three[: len(two) + 3] == [*two, 7, 8, 9]
    other, *_ = (call.prompt for call in calls_of(settings, [2]))
    assert other[:10] == one[:10] and other != one


def test_questions_are_asked_side_by_side() -> None:
    settings = BenchSettings(workload="questions", turns=3, prefix_len=10, prefix_groups=1, random_input_len=4)
    calls = calls_of(settings, [0, 1])
    assert len(calls) == 6
    assert len({str(call.prompt[:10]) for call in calls}) == 1


def test_examples_differ_but_the_instruction_does_not() -> None:
    settings = BenchSettings(workload="few-shot", prefix_len=40, prefix_groups=2, random_input_len=8)
    warm, *calls = calls_of(settings, range(-1, 4))
    assert {str(call.prompt[:10]) for call in calls} == {str(calls[0].prompt[:10])}
    assert str(calls[0].prompt[:40]) == str(calls[2].prompt[:40]) != str(calls[1].prompt[:40])
    assert warm.prompt[:10] != calls[0].prompt[:10]


def test_mixed_lengths_are_even_on_a_logarithmic_scale() -> None:
    settings = BenchSettings(workload="mixed-lengths", random_input_len=6400)
    lengths = np.array([len(call.prompt) for call in calls_of(settings, range(600))])
    assert 100 <= lengths.min() < 120 and 5000 < lengths.max() <= 6400
    assert np.median(lengths) == pytest.approx(800, rel=0.15)


def test_groups_share_their_prefix() -> None:
    settings = BenchSettings(workload="shared-prefix", prefix_len=20, prefix_groups=2, random_input_len=8)
    calls = calls_of(settings, range(-1, 4))
    heads = [str(call.prompt[:20]) for call in calls]
    assert heads[1] == heads[3] != heads[2] == heads[4]
    assert heads[0] not in heads[1:]


class Loops:
    """Programs that note when they start, on a loop whose time is only slept through."""

    def __init__(self, count: int, seconds: float) -> None:
        self.now, self.most, self.starts = 0, 0, list[float]()
        self.programs: list[Program] = [self.program for _ in range(count)]
        self.seconds, self.ended = seconds, 0

    async def program(self, _: Caller) -> None:
        self.starts.append(asyncio.get_running_loop().time())
        self.now += 1
        self.most = max(self.most, self.now)
        await asyncio.sleep(self.seconds)
        self.now -= 1

    def done(self) -> None:
        self.ended += 1


class SleeplessLoop(asyncio.SelectorEventLoop):
    """Time jumps to the next timer as soon as nothing is ready."""

    _now = 0.0

    def time(self) -> float:
        return self._now

    def _run_once(self) -> None:
        if not self._ready and self._scheduled:  # type: ignore[attr-defined]
            self._now = max(self._now, self._scheduled[0].when())  # type: ignore[attr-defined]
        super()._run_once()  # type: ignore[misc]


nobody = Listener()


def test_a_closed_loop_is_always_full() -> None:
    loops = Loops(20, 1.0)
    with asyncio.Runner(loop_factory=SleeplessLoop) as runner:
        runner.run(closed_loop(loops.programs, nobody, 4, loops.done))
    assert (loops.most, loops.ended) == (4, 20)
    assert loops.starts == sorted(float(i // 4) for i in range(20))


def test_an_open_loop_does_not_wait_for_answers() -> None:
    loops = Loops(2000, 100.0)
    with asyncio.Runner(loop_factory=SleeplessLoop) as runner:
        runner.run(open_loop(loops.programs, nobody, 10.0, random.Random(0), None, loops.done))
    gaps = np.diff(loops.starts)
    assert loops.most > 500
    assert gaps.mean() == pytest.approx(0.1, rel=0.1)
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.1)  # exponential gaps: a Poisson process


def test_bursts_arrive_together_at_the_same_rate() -> None:
    loops = Loops(2000, 0.1)
    with asyncio.Runner(loop_factory=SleeplessLoop) as runner:
        runner.run(open_loop(loops.programs, nobody, 10.0, random.Random(0), None, loops.done, burst=8))
    times, sizes = np.unique(loops.starts, return_counts=True)
    assert set(sizes) == {8}
    assert np.diff(times).mean() == pytest.approx(0.8, rel=0.2)


def test_an_open_loop_may_have_a_limit() -> None:
    loops = Loops(50, 1.0)
    with asyncio.Runner(loop_factory=SleeplessLoop) as runner:
        runner.run(open_loop(loops.programs, nobody, 100.0, random.Random(0), 3, loops.done))
    assert (loops.most, loops.ended) == (3, 50)


@given(st.lists(st.floats(-1e6, 1e6), min_size=1), st.floats(0, 100))
def test_percentiles_are_numpys(values: list[float], share: float) -> None:
    assert percentile(values, share) == pytest.approx(float(np.percentile(values, share)), abs=1e-6)


def record(pieces: list[Piece], **meta: Any) -> Record:
    total = sum(piece.tokens for piece in pieces)
    meta = {"prompt_tokens": 10, "cached_tokens": 5, "completion_tokens": total, "denoise_steps": 4} | meta
    return Record(10, total, 0.0, seconds=pieces[-1].at, pieces=pieces, meta=meta)


def test_the_figures() -> None:
    records = [
        record([Piece(1.0, 4), Piece(1.5, 4), Piece(3.5, 2)], kv_density=0.5),
        record([Piece(2.0, 4)]),
        Record(10, 4, 0.0, error="503: full"),
        Record(10, 4, 0.0, abandoned=True),
    ]
    before = {"internal_states": [{"forwards": 5, "generated_tokens": 10}]}
    after = {"internal_states": [{"forwards": 12, "generated_tokens": 24}], "sparse_method": "losa"}
    found = result(BenchSettings(), records, 2.0, before, after)
    expected = {
        "completed": 2, "failed": 1, "abandoned": 1, "total_input_tokens": 20, "total_output_tokens": 14,
        "request_throughput": 1.0, "output_throughput": 7.0, "concurrency": 2.75, "mean_ttft_ms": 1500.0,
        "median_e2e_latency_ms": 2750.0, "mean_block_ms": 1250.0, "mean_tpot_ms": 2500 / 6,
        "mean_itl_ms": 2500 / 6, "cache_hit_rate": 0.5, "tokens_per_step": 14 / 8, "kv_density": 0.5,
        "forwards": 7, "tokens_per_forward": 2.0, "sparse_method": "losa", "active_share": None,
        "request_rate": "inf", "max_concurrency": 8,
    }  # fmt: skip
    assert {key: found[key] for key in expected} == pytest.approx(expected)
    assert json.loads(json.dumps(found, allow_nan=False)) == found


@pytest.mark.parametrize(
    ("limits", "good"),
    [
        ({"slo_ttft_ms": 1000}, 2),
        ({"slo_ttft_ms": 999}, 0),
        ({"slo_block_ms": 1250}, 3),
        ({"slo_block_ms": 1249}, 2),
        ({"slo_e2e_ms": 3499}, 2),
        ({"slo_ttft_ms": 1000, "slo_block_ms": 1000}, 1),
        ({"slo_ttft_ms": 9000, "slo_block_ms": 9000, "slo_e2e_ms": 9000}, 3),
    ],
)
def test_goodput(limits: dict[str, float], good: int) -> None:
    records = [
        record([Piece(1.0, 4), Piece(1.5, 4), Piece(3.5, 2)]),
        record([Piece(2.0, 4)]),
        record([Piece(1.0, 4)]),
        Record(10, 4, 0.0, error="503: full"),
        Record(10, 4, 0.0, abandoned=True),
    ]
    found = result(BenchSettings(**limits), records, 2.0, {}, {})
    assert (found["goodput"], found["good_share"]) == (good / 2.0, good / 4)


def test_what_the_server_counted() -> None:
    about = {"kv_pool_bytes": 1000}
    before = about | {"internal_states": [{"busy_s": 1.0, "forward_s": 0.5}]}
    state = {
        "cpu_s": 3.0,
        "generated_tokens": 12,
        "busy_s": 5.0,
        "forward_s": 3.5,
        "pages_total": 100,
        "pages_free": 70,
        "engine_rss_bytes": 5,
    }
    after = about | {"internal_states": [state]}
    found = result(BenchSettings(), [record([Piece(1.0, 4)], forwards=9, blocks=3)], 2.0, before, after)
    assert found["host_share"] == pytest.approx(0.25)
    assert (found["engine_cores"], found["tokens_per_cpu_s"]) == (1.5, 4.0)
    assert (found["kv_bytes_held"], found["engine_rss_bytes"], found["forwards_per_block"]) == (300, 5, 3)
    assert result(BenchSettings(), [], 2.0, {}, {})["host_share"] is None


def test_the_keys_are_those_of_sglangs_load_tester() -> None:
    import sglang

    source = ast.parse((Path(sglang.__file__).parent / "bench_serving.py").read_text())
    tables = [n.value for n in ast.walk(source) if isinstance(n, ast.Assign) and isinstance(n.value, ast.Dict)]
    theirs = max((ast.literal_eval(ast.List(t.keys, ast.Load())) for t in tables if all(t.keys)), key=len)
    assert "mean_ttft_ms" in theirs
    foreign = {"sharegpt_output_len", "total_output_tokens_retokenized", "accept_length"}
    assert set(theirs) - foreign <= set(result(BenchSettings(), [], 1.0, {}, {}))


def run(server: AppServer, **settings: Any) -> tuple[dict[str, Any], list[Record]]:
    small = {"num_prompts": 6, "random_input_len": 12, "random_output_len": 10, "warmup_requests": 1}
    return asyncio.run(measure(server.url, None, BenchSettings(**(small | settings)), lambda: None))


@pytest.mark.parametrize("rate", [math.inf, 200.0])
def test_against_a_server(server: AppServer, rate: float) -> None:
    before = server.engine.added
    found, records = run(server, request_rate=rate, flush_cache=True)
    assert server.engine.added - before == 7
    assert (found["completed"], found["total_output_tokens"]) == (6, 60)
    assert found["kv_density"] == 0.25
    assert all(r.pieces and r.output_len == 10 for r in records)
    assert all(r.pieces == sorted(r.pieces) and r.seconds >= r.pieces[-1].at > 0 for r in records)
    assert all(request.sampling.ignore_eos for request in server.engine.seen[-6:])


def test_refusals_are_counted(server: AppServer) -> None:
    found, records = run(server, random_input_len=5000, num_prompts=2, warmup_requests=0)
    assert (found["completed"], found["failed"], found["mean_ttft_ms"]) == (0, 2, None)
    assert records[0].error is not None
    assert records[0].error.startswith("400: ")


def test_a_call_may_be_given_up(server: AppServer) -> None:
    async def give_up() -> list[Record]:
        async with Client(server.url, None, 30) as client:
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(client.call(Call("HANG", 8)), 0.2)
            return client.records

    [gone] = asyncio.run(give_up())
    assert (gone.abandoned, gone.error, gone.completed) == (True, None, False)
    assert gone.seconds >= 0.2


@pytest.mark.parametrize("after", [0, 2])
def test_a_client_that_hangs_up(server: AppServer, after: int) -> None:
    async def hang_up() -> Record:
        async with Client(server.url, None, 30) as client:
            return await client.call(Call("SLOW " * 40, 200, {"ignore_eos": True}, leave_after=after))

    before = server.engine.aborted
    record = asyncio.run(hang_up())
    assert (record.abandoned, record.error, len(record.pieces)) == (True, None, after)
    deadline = time.monotonic() + 30
    while server.engine.aborted == before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert server.engine.aborted == before + 1


def test_who_hangs_up_is_counted_apart(server: AppServer) -> None:
    found, records = run(server, abort_share=1.0, num_prompts=12)
    assert found["abandoned"] >= 1 and found["failed"] == 0  # some answers are complete before their clients can leave
    assert found["abandoned"] + found["completed"] == len(records) == 12


@pytest.mark.parametrize("workload", WITH_CALLS)
def test_every_workload_runs_through(server: AppServer, workload: str) -> None:
    found, records = run(server, workload=workload, prefix_len=20, custom_params={"denoising_steps": 2})
    assert found["failed"] == 0 and found["completed"] == len(records) >= 6
    assert server.engine.seen[-1].sampling.custom_params.denoising_steps == 2


def test_programs_of_sglang(server: AppServer) -> None:
    found, records = run(server, workload="programs", prefix_len=20, turns=2, num_prompts=3, warmup_requests=0)
    choices = [record for record in records if not record.max_new_tokens]
    assert (found["completed"], found["failed"], len(choices)) == (9, 0, 3)
    assert all(record.output_len == 10 and record.prompt_len > 20 for record in records if record.max_new_tokens)
    texts = [
        server.engine.tokenizer.decode(r.prompt_ids, False) for r in server.engine.seen if r.sampling.max_new_tokens
    ]
    assert len(set(texts[-6:])) == 6


def test_a_program_that_fails_is_a_failed_call() -> None:
    async def main() -> list[Record]:
        settings = BenchSettings(workload="programs")
        listener = Listener()
        listener.url = "http://127.0.0.1:9"
        await WORKLOADS["programs"](settings, TOKENS).program(0)(listener)
        return listener.records

    [failed] = asyncio.run(main())
    assert failed.error is not None and not failed.completed


def test_what_programs_do_not_know_is_refused() -> None:
    with pytest.raises(ConfigError, match="--abort-share"):
        WORKLOADS["programs"](BenchSettings(workload="programs", abort_share=0.5), TOKENS)


def test_no_server() -> None:
    with pytest.raises(ServerUnreachable, match=r"http://127\.0\.0\.1:9"):
        asyncio.run(measure("http://127.0.0.1:9", None, BenchSettings(), lambda: None))


def test_a_server_that_does_not_know_its_vocabulary() -> None:
    from losa_server.bench.run import tokens_of

    with pytest.raises(ConfigError, match="give --vocab-size"):
        tokens_of({}, BenchSettings())
    assert tokens_of({"vocab_size": 9}, BenchSettings(vocab_size=7)) == (7, None)


SMALL = ["--num-prompts", "3", "--random-input-len", "8", "--random-output-len", "8", "--warmup-requests", "0"]


def test_the_command(server: AppServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "out.jsonl"
    words = ["bench", "--url", server.url, *SMALL, "--output-file", str(file), "--output-details"]
    assert [losa(words), losa(words)] == [0, 0]
    shown = capsys.readouterr()
    last = json.loads(shown.out.splitlines()[-1])
    assert last["completed"] == 3
    assert "output tokens per s" in shown.err
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(lines) == 2
    assert lines[1]["output_lens"] == [8, 8, 8]
    assert lines[1]["duration"] == last["duration"]


def test_a_failure_is_the_commands_failure(server: AppServer, capsys: pytest.CaptureFixture[str]) -> None:
    assert losa(["bench", "--url", server.url, *SMALL, "--random-input-len", "5000"]) == 1
    assert "3 failed: 400: " in capsys.readouterr().err
    assert losa(["bench", "--url", "http://127.0.0.1:9", *SMALL]) == 1
    assert "losa bench: error: http://127.0.0.1:9" in capsys.readouterr().err


def test_settings_of_a_server_mean_nothing_to_a_running_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert losa(["bench", "--url", "http://127.0.0.1:9", "--page-size", "8"]) == 2
    assert "--page-size: describes a server to be started, but --url names" in capsys.readouterr().err
    assert losa(["bench"]) == 2
    assert "--model-path is required" in capsys.readouterr().err


@pytest.mark.slow
def test_a_server_of_its_own(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LOSA_TOKEN_BUDGET", "32")
    monkeypatch.setenv("LOSA_PORT", "1")  # for `losa serve`; the server for the test takes a free port
    words = ["--model-path", str(tiny_checkpoint), "--max-total-tokens", "4096", "--sparse-method", "losa"]
    assert losa(["bench", *words, *SMALL, "--token-budget", "64"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["completed"], found["sparse_method"], found["token_budget"]) == (3, "losa", 64)
    assert found["total_output_tokens"] == 24
    assert losa(["bench", *words, *SMALL, "--page-size", "7"]) == 1
    assert "the server ended with exit code 1" in capsys.readouterr().err


def test_a_server_of_its_own_ends_with_the_command(tiny_checkpoint: Path) -> None:
    """Also where a SIGTERM ends the command while that server loads or answers."""
    command = [sys.executable, "-P", "-m", "losa_server", "bench", "--model", str(tiny_checkpoint)]
    bench = psutil.Popen([*command, "--num-prompts", "100000"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (started := bench.children(recursive=True)) and time.monotonic() < deadline:
        time.sleep(0.1)
    bench.terminate()
    assert started and bench.wait(60) == TERMINATED
    assert not psutil.wait_procs(started, 30)[1]
