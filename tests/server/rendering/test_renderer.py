"""Rendering in processes: what comes back, and that a template which hangs or grows costs nobody else anything."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable
from typing import Any

import psutil
import pytest

from losa_runtime.core.errors import InvalidRequest
from losa_server.errors import RequestFailed
from losa_server.rendering import renderer as room
from losa_server.rendering.renderer import Renderer

USER = [{"role": "user", "content": "hé <|im_end|>"}]
SIMPLE = "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}{{ mood }}{% if tools %}T{% endif %}"
HANGS = (
    "{% if messages[0].content == 'hang' %}{% for a in range(90000) %}{% for b in range(90000) %}"
    "{% endfor %}{% endfor %}{% endif %}fine"
)
GROWS = "{% if messages[0].content == 'text' %}{% for a in range(90000) %}{{ 'x' * 90000 }}{% endfor %}{% endif %}"
SWELLS = "{% if messages[0].content == 'memory' %}{{ ('x' * 9000000000) | length }}{% endif %}fine"


def children() -> set[int]:
    return {p.pid for p in psutil.Process().children() if p.status() != psutil.STATUS_ZOMBIE}


def run(template: str, use: Callable[[Renderer], Awaitable[Any]], seconds: float = 60, workers: int = 2) -> Any:
    async def whole() -> Any:
        renderer = Renderer(template, {"eos_token": "<|im_end|>"}, ["<|im_end|>"], seconds, workers)
        try:
            return await use(renderer)
        finally:
            await renderer.close()

    before = children()
    try:
        return asyncio.run(whole())
    finally:
        assert children() <= before, "a process was left behind"


def say(content: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content}]}


def test_pieces_and_variables() -> None:
    async def use(renderer: Renderer) -> Any:
        assert children() == before, "started before it was needed"
        pieces = await renderer.render({"messages": USER, "mood": "!", "tools": []})
        return pieces, await renderer.variables(), await renderer.render(say("a"))

    before = children()
    pieces, variables, again = run(SIMPLE, use)
    assert pieces == ["hé <", "|im_end|><|im_end|>!"]
    assert again == ["a<|im_end|>"]
    assert {"messages", "tools", "mood"} <= variables


def test_many_at_once_keep_apart() -> None:
    async def use(renderer: Renderer) -> Any:
        return await asyncio.gather(*(renderer.render(say(f"{i}" * 1000)) for i in range(30)))

    assert run(SIMPLE, use) == [[f"{i}" * 1000 + "<|im_end|>"] for i in range(30)]


def test_a_template_that_hangs_is_ended() -> None:
    async def use(renderer: Renderer) -> None:
        await renderer.variables()
        with pytest.raises(InvalidRequest, match=r"renders within 1\.5 s"):
            await renderer.render(say("hang"))
        with pytest.raises(InvalidRequest, match="renders within"):
            await asyncio.gather(renderer.render(say("hang")), renderer.render(say("hang")))

    run(HANGS, use, seconds=1.5)


def test_others_are_served_meanwhile() -> None:
    async def use(renderer: Renderer) -> None:
        await renderer.variables()
        hanging = asyncio.create_task(renderer.render(say("hang")))
        assert await renderer.render(say("a")) == ["fine"]
        assert not hanging.done()
        hanging.cancel()  # the client has left
        await asyncio.gather(hanging, return_exceptions=True)
        assert await renderer.render(say("b")) == ["fine"]

    run(HANGS, use)


@pytest.mark.parametrize(("template", "what"), [(GROWS, "text"), (SWELLS, "memory")])
def test_a_template_that_grows_is_refused(template: str, what: str) -> None:
    async def use(renderer: Renderer) -> Any:
        with pytest.raises(InvalidRequest, match=r"renders (to at most|within the memory)") as caught:
            await renderer.render(say(what))
        assert caught.value.field == "messages"
        return await renderer.render(say("small"))

    assert run(template, use) in (["fine"], [""])


@pytest.mark.parametrize(
    ("template", "answer"),
    [("{{ raise_exception('roles must alternate') }}", "roles must alternate"), ("{% if %}", "template is broken")],
)
def test_what_cannot_be_rendered_is_the_clients_to_know(template: str, answer: str) -> None:
    async def use(renderer: Renderer) -> None:
        for _ in range(2):
            with pytest.raises(InvalidRequest, match=answer):
                await renderer.render(say("a"))

    run(template, use)


def test_a_process_that_dies_is_replaced() -> None:
    async def use(renderer: Renderer) -> Any:
        await renderer.variables()
        (pid,) = children() - before
        os.kill(pid, signal.SIGSTOP)
        waiting = asyncio.create_task(renderer.render(say("a")))
        await asyncio.sleep(0.1)
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(RequestFailed, match="has ended"):
            await waiting
        return await renderer.render(say("a"))

    before = children()
    assert run(SIMPLE, use) == ["a<|im_end|>"]


def test_processes_get_no_secrets_and_outlive_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOSA_API_KEY", "secret")

    async def use(renderer: Renderer) -> None:
        await renderer.variables()
        (pid,) = children() - before
        process = psutil.Process(pid)
        assert "LOSA_API_KEY" not in process.environ()
        process.send_signal(signal.SIGINT)  # Ctrl-C reaches all processes
        assert await renderer.render(say("a")) == ["a<|im_end|>"]
        [worker] = renderer._idle
        worker._sink.close()  # what is left of a parent that was killed
        await asyncio.wait_for(worker._process.wait(), 30)

    before = children()
    run(SIMPLE, use)


def test_a_process_that_cannot_start_is_our_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "COMMAND", ("/bin/false",))

    async def use(renderer: Renderer) -> None:
        with pytest.raises(RequestFailed, match="could not start") as caught:
            await renderer.render(say("a"))
        assert caught.value.status_code == 500

    run(SIMPLE, use)
