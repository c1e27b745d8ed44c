"""SGLang's own programs as a workload: a document, a fork per question, and a choice among answers.

The frontend is unchanged and blocks, so each program has a thread. Its `gen` calls are streamed, for the time of the
first block; a `select` is one record without pieces of an answer.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import sglang as sgl
from sglang.lang.backend.runtime_endpoint import RuntimeEndpoint

from losa_server.bench.calls import Caller, Program, Record
from losa_server.bench.settings import BenchSettings
from losa_server.bench.source import Source
from losa_server.bench.workload import Workload

CHOICES = 3


class WatchedEndpoint(RuntimeEndpoint):
    """SGLang's client, noting what it asks for and what comes back. limit: of the tokens of an answer."""

    def __init__(self, caller: Caller, limit: int) -> None:
        super().__init__(caller.url, api_key=caller.api_key, chat_template_name="chatml")
        self._records, self._limit = caller.records, limit
        self.failed = False

    def generate(self, s: Any, sampling_params: Any) -> tuple[str, dict[str, Any]]:
        """A streamed call, read to its end."""

        def read(record: Record) -> tuple[str, dict[str, Any]]:
            text = ""
            for chunk, meta in super(WatchedEndpoint, self).generate_stream(s, sampling_params):
                text += chunk
                record.hear({"text": text, "meta_info": meta}, time.monotonic() - record.started)
            return text, record.meta

        return self._noting(read, self._limit)

    def select(self, *args: Any, **kwargs: Any) -> Any:
        """All calls of a choice."""
        return self._noting(lambda record: super(WatchedEndpoint, self).select(*args, **kwargs), 0)

    def _noting(self, work: Callable[[Record], Any], limit: int) -> Any:
        record = Record(0, limit, time.monotonic())
        self._records.append(record)
        try:
            return work(record)
        except Exception as error:
            self.failed = True
            record.error = record.error or f"{type(error).__name__}: {error}"
            raise
        finally:
            record.seconds = time.monotonic() - record.started
            record.prompt_len = record.meta.get("prompt_tokens", 0)


class ProgramsWorkload(Workload):
    """Programs whose documents are shared within a group; `turns` questions each, and one choice.

    A program that fails shows in the records of its calls.
    """

    def __init__(self, settings: BenchSettings, source: Source) -> None:
        super().__init__(settings, source)
        # Not the event loop's threads, of which there are too few for many programs at once.
        self._threads = ThreadPoolExecutor(settings.concurrency or settings.num_prompts)

    def program(self, number: int) -> Program:
        settings, rng = self.settings, self.rng(number)
        group = number % settings.prefix_groups if number >= 0 else "warm-up"
        document = self.source.text(self.rng("prefix", group), settings.prefix_len)
        questions = [self.source.text(rng, self.length(rng, settings.random_input_len)) for _ in range(settings.turns)]
        choices = [self.source.text(rng, 2 + longer) for longer in range(CHOICES)]
        given = {"document": document, "questions": questions, "choices": choices}
        limit = self.length(rng, settings.random_output_len)
        defaults = {"temperature": settings.temperature, "ignore_eos": not settings.disable_ignore_eos}

        def work(caller: Caller) -> None:
            began = time.monotonic()
            try:
                endpoint = WatchedEndpoint(caller, limit)
                state = read_and_choose.run(**given, **defaults, max_new_tokens=limit, backend=endpoint)
                state.sync()
                error = None if endpoint.failed else state.error()
            except Exception as failure:
                error = failure
            if error is not None:
                caller.records.append(Record(0, limit, began, time.monotonic() - began, error=str(error)))

        async def run(caller: Caller) -> None:
            await asyncio.get_running_loop().run_in_executor(self._threads, work, caller)

        return run


@sgl.function
def read_and_choose(s: Any, document: str, questions: list[str], choices: list[str]) -> None:
    """Read once, answer side by side, choose."""
    s += sgl.user_begin() + document
    s.sync()  # fork caches the common text only if it is there already
    branches = s.fork(len(questions))
    for branch, question in zip(branches, questions, strict=True):
        branch += "\n\n" + question + sgl.user_end()
        branch += sgl.assistant(sgl.gen("answer"))
    for branch in branches:
        branch.sync()
    s += "\n\n" + questions[0] + sgl.user_end()
    s += sgl.assistant_begin() + sgl.select("choice", choices=choices)
