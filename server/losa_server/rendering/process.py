"""The process that renders: `python -m losa_server.rendering.process`. Frames of JSON in, one frame out for each.

The first frame is a Setup and is answered by the names that the template reads; every further one is a conversation,
answered by the pieces of its text. It ends with its standard input, with its memory or CPU limit, or when it is killed.
"""

from __future__ import annotations

import resource
import signal
import struct
import sys
import time
from typing import Any, BinaryIO, NamedTuple

import orjson

from losa_runtime.chat_template import ChatTemplate
from losa_runtime.core.errors import InvalidRequest
from losa_server.rendering.guard import cut, guard

HEADER = struct.Struct("<Q")
MEMORY_LIMIT = 2 << 30  # bytes of address space


class Setup(NamedTuple):
    """template: Jinja source. names: what it may call by name. specials: spellings of special tokens. seconds: CPU
    time of one rendering, after which the process ends by itself, should nobody be left to end it."""

    template: str
    names: dict[str, str]
    specials: list[str]
    seconds: float


def frame(value: Any) -> bytes:
    """A value as it is sent."""
    body = orjson.dumps(value)
    return HEADER.pack(len(body)) + body


def read(stream: BinaryIO) -> Any:
    """The next value. Raises EOFError at the end of the stream."""
    head = stream.read(HEADER.size)
    if len(head) < HEADER.size:
        raise EOFError
    return orjson.loads(stream.read(HEADER.unpack(head)[0]))


def longest(conversation: Any) -> int:
    """Characters that a conversation may render to: templates repeat and indent, but only so much."""
    return 4 * len(orjson.dumps(conversation)) + (1 << 20)


def render(template: ChatTemplate, specials: list[str], conversation: dict[str, Any]) -> list[str]:
    """The pieces of a conversation's text. Raises InvalidRequest."""
    limit = longest(conversation)
    guarded = guard(conversation, specials)
    try:
        text = template.render(longest=limit, **guarded.value)
    except MemoryError:
        raise InvalidRequest("messages", "a conversation", "one that renders within the memory limit") from None
    return cut(text, guarded.stand_ins, specials)


def main() -> int:
    """Serve until the end of standard input."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides what it means
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))
    source, sink = sys.stdin.buffer, sys.stdout.buffer
    try:
        setup = Setup(*read(source))
    except EOFError:
        return 0
    template: ChatTemplate | None = None
    while True:
        try:
            if template is None:
                template = ChatTemplate(setup.template, setup.names)
                answer: dict[str, Any] = {"variables": sorted(template.variables)}
            else:
                conversation = read(source)
                _limit_cpu(setup.seconds)
                answer = {"pieces": render(template, setup.specials, conversation)}
        except EOFError:
            return 0
        except InvalidRequest as error:
            answer = {"field": error.field, "found": str(error.found)[:120], "allowed": error.allowed}
        sink.write(frame(answer))
        sink.flush()
        if template is None:
            return 1


def _limit_cpu(seconds: float) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (int(time.process_time() + seconds) + 2, hard))


if __name__ == "__main__":
    sys.exit(main())
