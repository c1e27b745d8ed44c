"""What the HTTP process and the engine process may say to one another: frozen models in two tagged unions, as JSON.

This room knows the words, not the wire (`channel`) and not what either side does with a message. Decoding builds values
only: nothing that arrives here can name a class, a function or a file to be run.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Annotated, Any, Literal, NamedTuple, Self

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from losa_runtime.core.config import EngineConfig
from losa_runtime.core.request import Alternatives, Request, RequestOutput
from losa_server.logs import LogFormat

# The most negative log-probability that is sent; stands for "impossible" and keeps JSON free of infinities.
LOGPROB_FLOOR = -9999.0


class Message(BaseModel):
    """Base of every message: frozen, and closed against fields that nobody declared."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class GenerateRequest(Message):
    """Start requests. Each is answered by exactly one RequestError or one output that carries a `finish`.

    Those of one message are all taken in before the next step, so that refusals come before anybody's first token.
    """

    kind: Literal["generate"] = "generate"
    requests: tuple[Request, ...] = Field(min_length=1)


class AbortRequest(Message):
    """End a request early. Harmless when the engine does not know the rid (any more)."""

    kind: Literal["abort"] = "abort"
    rid: str


class FlushCache(Message):
    """Forget all cached prefixes. Answered by FlushDone with the same ticket."""

    kind: Literal["flush_cache"] = "flush_cache"
    ticket: int


class GetStats(Message):
    """Ask for the engine's counters. Answered by EngineStats with the same ticket."""

    kind: Literal["get_stats"] = "get_stats"
    ticket: int


class Shutdown(Message):
    """End the engine process. Live requests are dropped; whoever sends this has answered their clients."""

    kind: Literal["shutdown"] = "shutdown"


class TokenOutputs(Message):
    """All news of one engine step."""

    kind: Literal["outputs"] = "outputs"
    outputs: tuple[RequestOutput, ...]

    @classmethod
    def of(cls, outputs: Iterable[RequestOutput]) -> Self:
        """Wrap a step's outputs; log-probabilities that JSON cannot carry become LOGPROB_FLOOR."""
        return cls(outputs=tuple(_finite(output) for output in outputs))


class RequestError(Message):
    """A request ended without a result. status_code: HTTP. field: dotted name of what was wrong in it, if one was."""

    kind: Literal["request_error"] = "request_error"
    rid: str
    status_code: int
    message: str
    field: str | None = None


class EngineReady(Message):
    """The engine has loaded. info: JSON facts about model, pools and defaults (`Engine.info`)."""

    kind: Literal["ready"] = "ready"
    info: dict[str, Any]


class EngineStats(Message):
    """The engine's counters (`Engine.stats`): the answer to GetStats, or with ticket 0 what it tells unasked.

    The unasked ones also have `gen_throughput` (tokens per second) and `recent_hit_rate`, since the one before.
    """

    kind: Literal["stats"] = "stats"
    ticket: int
    stats: dict[str, Any]


class EngineLoad(Message):
    """How full the queue is, told when it has changed. received: requests that have come so far, refused ones too;
    waiting: those that wait for their admission."""

    kind: Literal["load"] = "load"
    received: int
    waiting: int


class Heartbeat(Message):
    """The engine process is alive. stalled_s: for how long there has been work and no forward has come to its end."""

    kind: Literal["heartbeat"] = "heartbeat"
    stalled_s: float


class FlushDone(Message):
    """Answer to FlushCache. flushed: False when requests were pending and nothing was forgotten."""

    kind: Literal["flush_done"] = "flush_done"
    ticket: int
    flushed: bool


class EngineFailed(Message):
    """The last message of an engine that could not start or go on."""

    kind: Literal["failed"] = "failed"
    message: str


class EngineStart(Message):
    """What an engine process reads from its standard input: its configuration and where to speak.

    to_engine, to_frontend: socket addresses. parent: process id of the owner; the engine ends when that process does.
    beat_s: seconds between two heartbeats.
    """

    config: EngineConfig
    to_engine: str
    to_frontend: str
    parent: int
    beat_s: float = 0.5
    log_level: str = "info"
    log_format: LogFormat = "text"


ToEngine = Annotated[
    GenerateRequest | AbortRequest | FlushCache | GetStats | Shutdown,
    Field(discriminator="kind"),
]
ToFrontend = Annotated[
    TokenOutputs | RequestError | EngineReady | EngineStats | EngineLoad | Heartbeat | FlushDone | EngineFailed,
    Field(discriminator="kind"),
]


class Direction(NamedTuple):
    """One way of the channel. name: of its socket file; words: the only messages that it carries."""

    name: str
    words: TypeAdapter[Any]


# Values are names and texts that hardly come twice: a cache of them would grow for tens of thousands of requests.
_CACHE = ConfigDict(cache_strings="keys")
TO_ENGINE = Direction("to_engine", TypeAdapter(ToEngine, config=_CACHE))
TO_FRONTEND = Direction("to_frontend", TypeAdapter(ToFrontend, config=_CACHE))


def encode(message: Message) -> bytes:
    """A message as JSON bytes."""
    return message.model_dump_json().encode()


def finite_logprob(value: float) -> float:
    """The value itself, or LOGPROB_FLOOR for NaN and minus infinity (and anything below the floor)."""
    return LOGPROB_FLOOR if math.isnan(value) or value < LOGPROB_FLOOR else min(value, 0.0)


def _finite_values(values: tuple[float | None, ...]) -> tuple[float | None, ...]:
    return tuple(None if value is None else finite_logprob(value) for value in values)


def _finite_others(others: Alternatives) -> Alternatives:
    top, asked = (tuple(map(finite_logprob, values)) for values in (others.top_logprobs, others.asked))
    return others._replace(top_logprobs=top, asked=asked)


def _finite(output: RequestOutput) -> RequestOutput:
    changes: dict[str, tuple[Any, ...]] = {}
    for name in ("output_logprobs", "prompt_logprobs"):
        values: tuple[float | None, ...] | None = getattr(output, name)
        if values is not None:
            changes[name] = _finite_values(values)
    for name in ("output_alternatives", "prompt_alternatives"):
        others: tuple[Alternatives | None, ...] | None = getattr(output, name)
        if others is not None:
            changes[name] = tuple(None if o is None else _finite_others(o) for o in others)
    return output.model_copy(update=changes) if changes else output
