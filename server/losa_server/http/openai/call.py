"""What both kinds of completion have in common: the model's name, the stream options, one Ask per choice.

Knows neither prompts nor messages.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from typing import Any

from losa_runtime.core.errors import InvalidRequest
from losa_server.errors import RequestFailed
from losa_server.http.fields import flag, integer, labels, mapping, namespaces, priorities
from losa_server.http.generate_request import copies
from losa_server.http.openai.wishes import ParsedWishes, Words
from losa_server.request_manager import Ask, RequestManager

MAX_TOP_LOGPROBS = 20
# What clients and routers write when they mean "whatever you serve".
_ANY_MODEL = ("", "unknown", "default")


@dataclass(frozen=True)
class Call:
    """A validated request. asks: `n` for each prompt, one after the other. logprobs: None, or how many likeliest tokens
    are shown beside each. usage_chunk, usage_always: of a stream. with_meta, with_prompt_ids: SGLang's extras."""

    id: str
    model: str
    asks: tuple[Ask, ...]
    n: int
    words: Words
    stream: bool
    logprobs: int | None
    usage_chunk: bool
    usage_always: bool
    with_meta: bool
    with_prompt_ids: bool


def served_name(manager: RequestManager) -> str:
    """The model's public name: as configured, else its path."""
    return manager.settings.served_model_name or str(manager.info.get("model_path", ""))


def check_model(manager: RequestManager, model: Any) -> str:
    """The name to be answered with: the client's own, if it names the served model. Raises RequestFailed (404)."""
    if model is None or model in _ANY_MODEL:
        return served_name(manager)
    if not isinstance(model, str):
        raise InvalidRequest("model", model, "a string")
    known = {served_name(manager), manager.info.get("model_path"), manager.info.get("served_model_name")}
    if model not in known:
        message = f"there is no model {model[:200]!r}; this server has {served_name(manager)!r}"
        raise RequestFailed(404, message, "model", "model_not_found")
    return model


def make_call(
    manager: RequestManager,
    body: dict[str, Any],
    prompts: list[tuple[str, str | tuple[int, ...]]],
    wishes: ParsedWishes,
    kind: str,
    logprobs: int | None,
    score: bool = False,
) -> Call:
    """Put a call together. prompts: each with the client's name for it. kind: prefix of the answer's id. score: also
    report the prompts' log-probabilities."""
    model = check_model(manager, body.get("model"))
    count, most = len(prompts), manager.settings.max_prompts
    if count * wishes.n > most:
        raise InvalidRequest("n", f"{count} prompts times {wishes.n}", f"at most {most} choices in one call")
    names = labels(body, count)
    ranks = priorities(body, count)
    spaces = namespaces(body, count)
    options = mapping(body, "stream_options")
    id_ = body["rid"] if isinstance(body.get("rid"), str) else f"{kind}-{uuid.uuid4().hex}"
    asks: list[Ask] = []
    for i, (field, prompt) in enumerate(prompts):
        ask = Ask(
            prompt=prompt,
            sampling=wishes.sampling,
            field=field,
            label=names[i] or id_,
            score_start=0 if score else None,
            output_logprobs=logprobs is not None,
            top_logprobs=logprobs or 0,
            namespace=spaces[i],
            priority=ranks[i],
        )
        asks.extend(copies(ask, wishes.n))
    return Call(
        id=id_,
        model=model,
        asks=tuple(asks),
        n=wishes.n,
        words=wishes.words,
        stream=flag(body, "stream"),
        logprobs=logprobs,
        usage_chunk=flag(options, "include_usage"),
        usage_always=flag(options, "continuous_usage_stats"),
        with_meta=flag(body, "return_meta_info"),
        with_prompt_ids=flag(body, "return_prompt_token_ids"),
    )


def top_logprobs(body: dict[str, Any], name: str) -> int:
    """How many likeliest tokens are wanted beside each."""
    return integer(body, name, 0, 0, MAX_TOP_LOGPROBS)
