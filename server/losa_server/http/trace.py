"""Denoising steps as JSON, for the clients of /generate that ask to watch (`custom_params.trace`).

What is shown here is provisional until the block's text comes: behind a stop it may be dropped, and a block that is
opened again (step 0) starts from masks.
"""

from __future__ import annotations

from typing import Any

from losa_runtime.core.request import StepTrace
from losa_server.answer import Answer
from losa_server.request_manager import TokenizerFace


class TraceView:
    """The block that one request is writing, as far as it is known."""

    def __init__(self, tokenizer: TokenizerFace) -> None:
        self._tokenizer = tokenizer
        self._block: dict[int, int] = {}  # token ids by position

    def take(self, answer: Answer) -> list[dict[str, Any]]:
        """The steps since the last call, in order.

        Each is `{"block": [start, stop], "step", "revealed": [[position, token_id, logprob, text]], "ids", "texts"}`,
        with positions counted in output tokens. ids and texts show the block after the step, null where it is still
        masked; each text is its token decoded alone.
        """
        return [self._show(step) for step in answer.take_trace()]

    def _show(self, step: StepTrace) -> dict[str, Any]:
        if step.step == 0:
            self._block = {}
        self._block |= zip(step.positions, step.token_ids, strict=True)
        ids = [self._block.get(position) for position in range(step.start, step.stop)]
        text = self._tokenizer.token_text
        revealed = zip(step.positions, step.token_ids, step.logprobs, strict=True)
        return {
            "block": [step.start, step.stop],
            "step": step.step,
            "revealed": [[position, i, logprob, text(i)] for position, i, logprob in revealed],
            "ids": ids,
            "texts": [None if i is None else text(i) for i in ids],
        }
