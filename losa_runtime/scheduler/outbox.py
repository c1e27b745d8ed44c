"""What is to be told of requests, in order, until there is time to tell it: texts, stop strings, messages.

The next round does not need any of it, so on a device it is made while the next forward runs. Only then may a stop
string come to light; its request was in that forward for nothing. Whatever happens to a request, its first ending is
told and nothing after it. Knows no pages and no queue.
"""

from __future__ import annotations

import logging

from losa_runtime.core.request import FinishReason, RequestOutput
from losa_runtime.scheduler.progress import News, Step, error, tell, to_output
from losa_runtime.scheduler.req import Req

logger = logging.getLogger(__name__)


class Outbox:
    """Steps and endings that have not been told yet."""

    def __init__(self) -> None:
        self._entries: list[tuple[Req, Step | FinishReason]] = []

    def __len__(self) -> int:
        return len(self._entries)

    def put(self, req: Req, what: Step | FinishReason) -> None:
        """To be told behind all that is there already."""
        self._entries.append((req, what))

    def settle(self) -> tuple[list[RequestOutput], list[Req]]:
        """Everything that is to be told, and the requests that turned out to end with it (or failed in it)."""
        entries, self._entries = self._entries, []
        outputs: list[RequestOutput] = []
        found: list[Req] = []
        for req, what in entries:
            if req.ended:
                continue
            news = News(finish=what) if isinstance(what, FinishReason) else _told(req, what)
            if news is None:
                continue
            outputs.append(to_output(req, news))
            req.ended = news.finish is not None
            if req.ended and isinstance(what, Step):
                found.append(req)
        return outputs, found


def _told(req: Req, step: Step) -> News | None:
    """What raises here is this request's alone, e.g. its text."""
    try:
        return tell(req, step)
    except Exception:
        logger.exception("the text of request %s could not be made", req.request.rid)
        return News(finish=error("the engine failed on this request's results; the server's log says why"))
