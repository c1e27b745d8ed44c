"""The conversation in the terminal: lines in, answers out block by block, a few commands. Knows no model and no HTTP.

At a terminal, Ctrl-C stops an answer, and ends the chat where a line is expected, as Ctrl-D does. In a pipe, every line
is a turn, only answers go to standard output, and the exit code says whether anything went wrong.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from contextlib import closing
from typing import Any, TextIO

from rich.console import Console
from rich.table import Table

from losa_server.chat.partner import Message, NoAnswer, Partner

INTERRUPTED = 130
HELP = {
    "/help": "this list",
    "/reset": "begin a new conversation",
    "/stats": "what the last answer and the whole chat have cost",
    "/exit": "leave, as Ctrl-D does",
}


class Session:
    """One chat. source: where lines come from. screen: for everything but answers."""

    def __init__(self, partner: Partner, system: str | None, source: TextIO, out: TextIO, screen: Console) -> None:
        self._partner, self._system = partner, system
        self._source, self._out, self._screen = source, out, screen
        self._interactive = source.isatty()
        self._messages: list[Message] = []
        self._costs: list[dict[str, Any]] = []
        self._failed = False
        self._commands: dict[str, Callable[[], None]] = {
            "/help": self._help,
            "/reset": self._reset,
            "/stats": self._stats,
        }
        self._reset()

    def run(self) -> int:
        """Talk until the end of the lines; the exit code."""
        if self._interactive:
            self._say(f"{self._partner.name}; /help lists commands, a \\ at the end continues a line")
        try:
            while (line := self._read()) is not None and line != "/exit":
                self._turn(line)
        except KeyboardInterrupt:
            if not self._interactive:
                return INTERRUPTED
            self._out.write("\n")
        return 1 if self._failed and not self._interactive else 0

    def _read(self) -> str | None:
        """The next line with its continuations; None at the end."""
        parts: list[str] = []
        while True:
            part = self._line("... " if parts else "> ")
            if part is None:
                return "\n".join(parts) if parts else None
            if not part.endswith("\\"):
                return "\n".join([*parts, part])
            parts.append(part[:-1])

    def _line(self, prompt: str) -> str | None:
        if not self._interactive:
            line = self._source.readline()
            return line.rstrip("\r\n") if line else None
        try:
            return input(prompt)
        except EOFError:
            self._out.write("\n")
            return None

    def _turn(self, line: str) -> None:
        if not line.strip():
            return
        if line.startswith("/"):
            self._commands.get(line.strip(), self._unknown)()
            return
        self._messages.append({"role": "user", "content": line})
        started = time.monotonic()
        try:
            text = self._answer()
        except NoAnswer as error:
            self._messages.pop()
            self._failed = True
            self._say(str(error), style="red")
            return
        self._messages.append({"role": "assistant", "content": text})
        self._costs.append({**self._partner.cost, "seconds": time.monotonic() - started})

    def _answer(self) -> str:
        """Show an answer as it comes. What an interruption leaves of it stays in the conversation."""
        text = ""
        with closing(self._partner.answer(self._messages)) as pieces:  # type: ignore[type-var]
            try:
                for piece in pieces:
                    text += piece
                    self._out.write(piece)
                    self._out.flush()
            except KeyboardInterrupt:
                if not self._interactive:
                    raise
                self._out.write(" …")
            finally:
                self._out.write("\n")
                self._out.flush()
        return text

    # -- commands ---------------------------------------------------------------------------------------------------

    def _help(self) -> None:
        for name, text in HELP.items():
            self._say(f"{name:8}{text}")

    def _reset(self) -> None:
        self._messages = [{"role": "system", "content": self._system}] if self._system else []

    def _unknown(self) -> None:
        self._failed = True
        self._say(f"there is no such command; there are: {', '.join(HELP)}", style="red")

    def _stats(self) -> None:
        if not self._costs:
            self._say("nothing was answered yet")
            return
        table = Table("", "last answer", f"all {len(self._costs)}")
        for title, show in ROWS:
            table.add_row(title, show(self._costs[-1:]), show(self._costs))
        self._screen.print(table)

    def _say(self, text: str, style: str = "dim") -> None:
        self._screen.print(text, style=style, markup=False, highlight=False)


Costs = list[dict[str, Any]]


def _total(name: str) -> Callable[[Costs], str]:
    return lambda costs: f"{sum(cost.get(name) or 0 for cost in costs):,}"


def _mean(name: str) -> Callable[[Costs], str]:
    def show(costs: Costs) -> str:
        values = [cost[name] for cost in costs if cost.get(name) is not None]
        return f"{sum(values) / len(values):.1%}" if values else "–"

    return show


def _rate(costs: Costs) -> str:
    seconds = sum(cost["seconds"] for cost in costs)
    return f"{sum(cost.get('completion_tokens') or 0 for cost in costs) / seconds:.1f}" if seconds else "–"


ROWS: tuple[tuple[str, Callable[[Costs], str]], ...] = (
    ("prompt tokens", _total("prompt_tokens")),
    ("of these from the cache", _total("cached_tokens")),
    ("tokens", _total("completion_tokens")),
    ("tokens per s", _rate),
    ("blocks", _total("blocks")),
    ("denoising steps", _total("denoise_steps")),
    ("KV density, later steps", _mean("kv_density")),
    ("active rows, later steps", _mean("active_share")),
)


def standard(partner: Partner, system: str | None) -> Session:
    """A session on this process's own streams."""
    if sys.stdin.isatty():
        import readline  # noqa: F401 (gives `input` its line editing)
    return Session(partner, system, sys.stdin, sys.stdout, Console(stderr=True))
