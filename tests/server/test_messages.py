"""Messages survive the wire; what is no message is dropped, counted, and stops nobody."""

from __future__ import annotations

import ast
import asyncio
import gc
import os
import pickle
import random
import re
import stat
import threading
import tracemalloc
from functools import partial
from pathlib import Path

import pytest

from losa_runtime.core.request import FinishReason, Request, RequestOutput, ScoreSpec
from losa_runtime.core.sampling_params import SamplingParams
from losa_server import channel, messages
from losa_server.channel import AsyncReceiver, AsyncSender, Inbox, MessageTooLarge, Receiver, Sender, SocketDirectory
from losa_server.engine_loop import EngineReport
from losa_server.messages import (
    LOGPROB_FLOOR,
    TO_ENGINE,
    TO_FRONTEND,
    AbortRequest,
    Direction,
    EngineFailed,
    EngineReady,
    EngineStats,
    FlushCache,
    FlushDone,
    GenerateRequest,
    GetStats,
    Message,
    RequestError,
    Shutdown,
    TokenOutputs,
    encode,
)

REQUEST = Request(
    rid="r1",
    prompt_ids=(1, 2, 3),
    sampling=SamplingParams.parse(
        {
            "max_new_tokens": None,
            "temperature": 0,
            "stop": "é\n",
            "stop_token_ids": 7,
            "logit_bias": {"5": 1},
            "sampling_seed": 2**62,
            "custom_params": {"sparse_method": "losa", "token_budget": 64, "active_ratio": 1},
        }
    ),
    score=ScoreSpec(start=2),
    output_logprobs=True,
    namespace="ns",
)
OUTPUT = RequestOutput(
    rid="r1",
    text="\u2028ü",
    token_ids=(4, 5),
    output_logprobs=(-0.5, -1.0),
    finish=FinishReason(type="stop", matched=7),
)
TO_ENGINE_MESSAGES = [
    GenerateRequest(requests=(REQUEST,)),
    AbortRequest(rid="r1"),
    FlushCache(ticket=1),
    GetStats(ticket=2),
    Shutdown(),
]
TO_FRONTEND_MESSAGES = [
    TokenOutputs.of([OUTPUT]),
    RequestError(rid="r1", status_code=400, message="no", field="text"),
    EngineReady(info={"model_path": "m", "n": 1}),
    EngineStats(ticket=2, stats={"running": 0}),
    FlushDone(ticket=1, flushed=False),
    EngineFailed(message="gone"),
]


@pytest.mark.parametrize("message", TO_ENGINE_MESSAGES, ids=lambda m: m.kind)
def test_to_engine_round_trip(message: Message) -> None:
    assert Inbox(TO_ENGINE).decode([encode(message)]) == message


@pytest.mark.parametrize("message", TO_FRONTEND_MESSAGES, ids=lambda m: m.kind)
def test_to_frontend_round_trip(message: Message) -> None:
    assert Inbox(TO_FRONTEND).decode([encode(message)]) == message


def test_numbers_that_json_lacks_become_the_floor() -> None:
    output = RequestOutput(rid="r", prompt_logprobs=(float("-inf"), float("nan"), -1.5, 1e-7), output_logprobs=(-0.0,))
    back = Inbox(TO_FRONTEND).decode([encode(TokenOutputs.of([output]))])
    assert back is not None
    assert back.outputs[0].prompt_logprobs == (LOGPROB_FLOOR, LOGPROB_FLOOR, -1.5, 0.0)


class _Canary:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (self.path,)


def hostile_frames(canary: str, count: int) -> list[list[bytes]]:
    rng = random.Random(5)
    good = encode(GenerateRequest(requests=(REQUEST,)))
    frames = [
        [pickle.dumps(_Canary(canary))],
        [b""],
        [b"null"],
        [b"[]"],
        [b"{}"],
        [b'{"kind":"generate"}'],
        [b'{"kind":"nobody"}'],
        [b'{"kind":"abort","rid":"x","more":1}'],
        [b'{"kind":"abort","rid":7}'],
        [b'{"kind":"flush_cache","ticket":1e999}'],
        [b'{"kind":"flush_cache","ticket":' + b"9" * 5000 + b"}"],
        [b"[" * 200_000],
        [b'{"kind":' * 50_000],
        [b"\xff\xfe" * 100],
        [good, good],
        [good.replace(b'"temperature":0.0', b'"temperature":NaN')],
        [good.replace(b'"n":1', b'"n":1000000')],
        [encode(TO_FRONTEND_MESSAGES[0])],
    ]
    for _ in range(count):
        cut = rng.randrange(1, len(good))
        noise = bytearray(good[:cut])
        noise[rng.randrange(cut)] = rng.randrange(256)
        frames.append([bytes(noise)])
    return frames


def test_hostile_frames_are_dropped_and_counted(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    inbox = Inbox(TO_ENGINE)
    frames = hostile_frames(str(canary), 500)
    assert [inbox.decode(frame) for frame in frames] == [None] * len(frames)
    assert inbox.malformed == len(frames)
    assert not canary.exists()


def test_a_good_message_arrives_after_hostile_ones(tmp_path: Path) -> None:
    async def scenario() -> None:
        directory = SocketDirectory()
        assert stat.S_IMODE(directory.path.stat().st_mode) == 0o700
        sender = AsyncSender(directory.address(TO_ENGINE))
        receiver = Receiver(directory.address(TO_ENGINE), TO_ENGINE)
        for frames in hostile_frames(str(tmp_path / "canary"), 50):
            await sender._socket.send_multipart(frames)
        await sender.send(encode(Shutdown()))
        got: list[Message] = []
        while not got:
            message = await asyncio.to_thread(receiver.receive, 2.0)
            got += [message] if message is not None else []
        assert got == [Shutdown()]
        receiver.close()
        sender.close()
        directory.remove()
        assert not directory.path.exists()

    asyncio.run(scenario())


def test_too_large_messages_are_refused_before_they_are_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel, "MAX_MESSAGE_BYTES", 1000)

    async def scenario() -> None:
        directory = SocketDirectory()
        receiver = AsyncReceiver(directory.address(TO_FRONTEND), TO_FRONTEND)
        sender = Sender(directory.address(TO_FRONTEND))
        with pytest.raises(MessageTooLarge):
            sender.send(EngineFailed(message="x" * 2000))
        threading.Thread(target=sender.send, args=(EngineFailed(message="small"),)).start()
        assert await receiver.receive() == EngineFailed(message="small")
        sender.close()
        receiver.close()
        directory.remove()

    asyncio.run(scenario())


def test_no_code_travels_between_the_processes() -> None:
    forbidden = re.compile(
        r"\b(pickle|cloudpickle|dill|marshal|recv_pyobj|send_pyobj|eval|exec|multiprocessing)\b *[(.]?"
    )
    folder = Path(messages.__file__).parent
    for file in folder.rglob("*.py"):
        tree = ast.parse(file.read_text())
        names = [ast.unparse(n) for n in ast.walk(tree) if isinstance(n, ast.Import | ast.ImportFrom | ast.Call)]
        assert not [name for name in names if forbidden.match(name.removeprefix("import ").removeprefix("from "))], file
        assert "tcp://" not in file.read_text()


def test_reports_carry_the_rates_since_the_last_one() -> None:
    report = EngineReport()
    report.tokens = 50
    first = report.make({"prompt_tokens": 10, "cached_tokens": 5, "running": 1})
    assert (first["running"], first["recent_hit_rate"]) == (1, 0.5)
    assert isinstance(first["gen_throughput"], float)
    assert first["gen_throughput"] > 0
    second = report.make({"prompt_tokens": 30, "cached_tokens": 5})
    assert (second["gen_throughput"], second["recent_hit_rate"]) == (0.0, 0.0)
    assert report.make({"prompt_tokens": 40, "cached_tokens": 14})["recent_hit_rate"] == 0.9


@pytest.mark.parametrize("direction", [TO_ENGINE, TO_FRONTEND])
def test_nothing_of_messages_that_were_read_is_kept(direction: Direction) -> None:
    """pydantic caches strings that it reads, values too by default: with a name in each message that grows for long."""
    rids = [f"request-{number}-with-a-name" for number in range(4000)]
    make = AbortRequest if direction is TO_ENGINE else partial(RequestError, status_code=400, message="refused")
    frames = [encode(make(rid=rid)) for rid in rids]
    tracemalloc.start()
    try:
        for frame in frames:
            direction.words.validate_json(frame)
        gc.collect()
        kept, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert kept < 20_000
