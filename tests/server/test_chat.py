"""`losa chat`: turns, commands and interruptions; the same whether a server or a model in this process answers."""

from __future__ import annotations

import io
import os
import pty
import random
import re
import select
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from benchmarks.tiny_model.corpus import FactPlan, make_document
from losa_runtime.core.config import EngineConfig
from losa_server.chat.partner import Message, NoAnswer
from losa_server.chat.remote import RemotePartner
from losa_server.chat.session import Session
from losa_server.chat.settings import ChatSettings
from losa_server.cli import main as losa
from tests.server.app_server import AppServer
from tests.server.server_process import ROOT


class Echo:
    """Answers with the last message in two pieces; a message "fail" cannot be answered, "stop" is interrupted."""

    def __init__(self) -> None:
        self.name = "echo"
        self.cost: dict[str, Any] = {}
        self.seen: list[list[Message]] = []
        self.closed = 0

    def answer(self, messages: Sequence[Message]) -> Iterator[str]:
        self.seen.append([dict(message) for message in messages])
        text = messages[-1]["content"]
        if text == "fail":
            raise NoAnswer("no luck")
        try:
            yield text[:2]
            if text == "stop":
                raise KeyboardInterrupt
            yield text[2:]
            self.cost = {"prompt_tokens": 10, "completion_tokens": 4, "cached_tokens": 8, "kv_density": 0.25}
        finally:
            self.closed += 1


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def talk(*lines: str, system: str | None = None) -> tuple[int, Echo, str, str]:
    """Exit code, partner, what went to standard output and what to the screen, in a pipe."""
    partner, out, screen = Echo(), io.StringIO(), io.StringIO()
    source = io.StringIO("".join(f"{line}\n" for line in lines))
    code = Session(partner, system, source, out, Console(file=screen, width=100)).run()
    return code, partner, out.getvalue(), screen.getvalue()


def test_every_line_is_a_turn_of_one_conversation() -> None:
    code, partner, out, _ = talk("first", "", "second")
    assert (code, out) == (0, "first\nsecond\n")
    assert [m["content"] for m in partner.seen[1]] == ["first", "first", "second"]
    assert [m["role"] for m in partner.seen[1]] == ["user", "assistant", "user"]


def test_a_backslash_continues_a_line() -> None:
    _, partner, _, _ = talk("one\\", "two\\", "", "three")
    assert [seen[-1]["content"] for seen in partner.seen] == ["one\ntwo\n", "three"]


def test_a_new_conversation_keeps_the_instruction() -> None:
    _, partner, _, _ = talk("first", "/reset", "second", system="be brief")
    instruction = {"role": "system", "content": "be brief"}
    assert partner.seen[1] == [instruction, {"role": "user", "content": "second"}]


def test_what_cannot_be_answered_is_said_and_forgotten() -> None:
    code, partner, out, screen = talk("fail", "next")
    assert code == 1
    assert "no luck" in screen
    assert "no luck" not in out
    assert [m["content"] for m in partner.seen[1]] == ["next"]


def test_statistics_are_of_the_last_and_of_all_answers() -> None:
    _, _, out, screen = talk("/stats", "first", "second", "/stats")
    assert "nothing was answered yet" in screen
    assert re.search(r"prompt tokens +│ 10 +│ 20 ", screen)
    assert re.search(r"KV density, later steps +│ 25.0% +│ 25.0%", screen)
    assert out == "first\nsecond\n"


def test_commands() -> None:
    code, _, _, screen = talk("/help", "/exit", "never")
    assert code == 0
    assert "begin a new conversation" in screen
    code, _, _, screen = talk("/nope")
    assert code == 1
    assert "there are: /help, /reset, /stats, /exit" in screen


def test_an_interrupt_in_a_pipe_ends_everything() -> None:
    code, partner, _, _ = talk("stop", "next")
    assert (code, len(partner.seen), partner.closed) == (130, 1, 1)


def test_an_interrupt_at_a_terminal_stops_the_answer_only(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = iter(["stop", "next"])

    def typed(_: str) -> str:
        line = next(lines, None)
        if line is None:
            raise EOFError
        return line

    monkeypatch.setattr("builtins.input", typed)
    partner, out = Echo(), io.StringIO()
    assert Session(partner, None, Terminal(), out, Console(file=io.StringIO())).run() == 0
    assert out.getvalue() == "st …\nnext\n\n"
    assert [m["content"] for m in partner.seen[1]] == ["stop", "st", "next"]
    assert partner.closed == 2


# -- a server ----------------------------------------------------------------------------------------------------------


def remote(server: AppServer, key: str | None = None, **settings: Any) -> RemotePartner:
    return RemotePartner(server.url, key, ChatSettings(**settings))


def test_a_server_answers(server: AppServer, bundled: str) -> None:
    with remote(server, max_new_tokens=6, custom_params={"sparse_method": "losa"}, sampling_seed=3) as partner:
        assert partner.name == bundled
        text = "".join(partner.answer([{"role": "user", "content": "the red fox"}]))
        assert text
        assert (partner.cost["completion_tokens"], partner.cost["ended_by"]) == (6, "length")
        assert partner.cost["kv_density"] == 0.25
    sampling = server.engine.seen[-1].sampling
    assert (sampling.temperature, sampling.sampling_seed, sampling.max_new_tokens) == (0.0, 3, 6)
    assert sampling.custom_params.sparse_method == "losa"


def test_a_servers_refusal_is_the_reason(server: AppServer) -> None:
    with (
        remote(server, custom_params={"budget": 1}) as partner,
        pytest.raises(NoAnswer, match=r"answered 400: .*budget"),
    ):
        list(partner.answer([{"role": "user", "content": "the"}]))


def test_giving_up_ends_the_work(server: AppServer) -> None:
    with remote(server) as partner:
        answer = partner.answer([{"role": "user", "content": "SLOW fox " * 20}])
        next(answer)
        aborted = server.engine.aborted
        answer.close()  # type: ignore[attr-defined]
        deadline = time.monotonic() + 20
        while server.engine.aborted == aborted and time.monotonic() < deadline:
            time.sleep(0.02)
        assert server.engine.aborted == aborted + 1


def test_no_server(capsys: pytest.CaptureFixture[str]) -> None:
    assert losa(["chat", "--url", "http://127.0.0.1:9"]) == 1
    assert "losa chat: error: http://127.0.0.1:9: ConnectError" in capsys.readouterr().err


def test_a_key_is_sent(bundled: str) -> None:
    with AppServer(bundled, api_key="open-sesame") as server:
        with remote(server, "open-sesame", max_new_tokens=4) as partner:
            assert "".join(partner.answer([{"role": "user", "content": "the"}]))
        with pytest.raises(NoAnswer, match="401"), remote(server, "wrong"):
            pass


# -- a model in this process -------------------------------------------------------------------------------------------

DOCUMENT = make_document(random.Random("chat"), 300, FactPlan(codes=4))
QUESTION = f"{DOCUMENT.text}\n\n{DOCUMENT.questions[0].text}"
CODE = DOCUMENT.questions[0].answer


def test_a_model_in_this_process(bundled_checkpoint: Path) -> None:
    from losa_server.chat.local import LocalPartner

    config = EngineConfig(model=str(bundled_checkpoint), max_total_tokens=2048, show_progress=False)
    partner = LocalPartner(config, ChatSettings(max_new_tokens=16))
    assert "".join(partner.answer([{"role": "user", "content": QUESTION}])) == CODE
    assert (partner.cost["ended_by"], partner.cost["denoise_steps"] > 0) == ("stop", True)
    with pytest.raises(NoAnswer, match="context length"):
        list(partner.answer([{"role": "user", "content": QUESTION * 200}]))
    plain = partner.cost
    list(partner.answer([{"role": "user", "content": "<|im_end|>"}]))
    assert plain == {}
    # The user's spelling of a special token is text: more than the one token that it would be.
    assert partner.cost["prompt_tokens"] > 10


CHAT = [sys.executable, "-m", "losa_server", "chat", "--max-total-tokens", "2048", "--max-new-tokens", "16", "--model"]


@pytest.mark.slow
def test_at_a_terminal(bundled_checkpoint: Path) -> None:
    ours, theirs = pty.openpty()
    command = [*CHAT, str(bundled_checkpoint)]
    process = subprocess.Popen(command, cwd=ROOT, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True)
    os.close(theirs)
    seen, place = b"", 0

    def expect(text: bytes) -> None:
        """Wait until this stands behind what was expected before."""
        nonlocal seen, place
        deadline = time.monotonic() + 120
        while text not in seen[place:]:
            assert time.monotonic() < deadline, seen
            if select.select([ours], [], [], 0.5)[0]:
                seen += os.read(ours, 4096)
        place = seen.index(text, place) + len(text)

    try:
        expect(b"/help lists commands")
        expect(b"> ")
        os.write(ours, QUESTION.replace("\n", "\\\n").encode() + b"\n")
        expect(CODE.encode() + b"\r\n")
        expect(b"> ")
        os.write(ours, b"/stats\n")
        expect(b"denoising steps")
        expect(b"> ")
        os.write(ours, b"\x04")
        assert process.wait(60) == 0
        assert b"Traceback" not in seen
    finally:
        process.kill()
        process.wait()
        os.close(ours)


@pytest.mark.slow
def test_in_a_pipe(bundled_checkpoint: Path) -> None:
    text = QUESTION.replace("\n", "\\\n")
    command = [*CHAT, str(bundled_checkpoint)]
    done = subprocess.run(command, input=f"{text}\n/reset\n{text}\n", capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout) == (0, f"{CODE}\n{CODE}\n"), done.stderr
