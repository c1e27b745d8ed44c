"""The view of a block in the making."""

from __future__ import annotations

from losa_runtime.core.request import RequestOutput, StepTrace
from losa_runtime.tokenizer import Tokenizer
from losa_server.answer import Answer
from losa_server.http.trace import TraceView


def test_masks_fill_up_and_a_block_may_start_over(bundled: str) -> None:
    tokenizer = Tokenizer(bundled)
    ids = tokenizer.encode("ab")
    steps = [
        StepTrace(3, 5, 0, (4,), (ids[0],), (-0.5,)),
        StepTrace(3, 5, 0, (4,), (ids[0],), (-0.5,)),  # opened again
        StepTrace(3, 5, 1, (3,), (ids[-1],), (-1.0,)),
        StepTrace(5, 7, 0, (5,), (ids[0],), (-0.5,)),
    ]
    answer, view = Answer(), TraceView(tokenizer)
    answer.add([RequestOutput(rid="r", trace=(step,)) for step in steps])
    shown = view.take(answer)
    assert [s["ids"] for s in shown] == [[None, ids[0]], [None, ids[0]], [ids[-1], ids[0]], [ids[0], None]]
    assert shown[2]["revealed"] == [[3, ids[-1], -1.0, tokenizer.token_text(ids[-1])]]
    assert shown[3]["texts"] == [tokenizer.token_text(ids[0]), None]
    assert view.take(answer) == [] == answer.trace
