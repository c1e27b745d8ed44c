"""The body of POST /generate: what is accepted, in SGLang's names, and how it becomes one Ask per prompt.

Pure functions from JSON values to Asks. Unknown fields are ignored, because routers and newer clients add some; known
ones that cannot be honoured are refused by name. Knows no sockets and no engine.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from losa_runtime.core.errors import InvalidRequest
from losa_runtime.core.request import MAX_ALTERNATIVES
from losa_runtime.core.sampling_params import MAX_COUNT, SamplingParams
from losa_server.http.fields import flag, labels, mapping, namespaces, per_prompt, priorities, refuse
from losa_server.http.wishes import Wishes, parse_wishes
from losa_server.request_manager import Ask

# Known fields that cannot be honoured, with the reason. Values that ask for nothing (null, false, 0, empty) are fine.
REFUSED: dict[str, str] = {
    "image_data": "null (the models are text only)",
    "audio_data": "null (the models are text only)",
    "video_data": "null (the models are text only)",
    "modalities": "null (the models are text only)",
    "input_embeds": "null (send `text` or `input_ids`)",
    "lora_path": "null (there are no adapters)",
    "lora_id": "null (there are no adapters)",
    "custom_logit_processor": "null (no code is taken from a request)",
    "return_hidden_states": "false",
    "return_routed_experts": "false",
    "return_entropy": "false",
    "return_bytes": "false",
    "session_params": "null (use the prefix cache: send the whole text again)",
    "bootstrap_host": "null (prefill and decoding share one engine)",
    "bootstrap_room": "null (prefill and decoding share one engine)",
}


@dataclass(frozen=True)
class GenerateCall:
    """A validated body. as_list: the answer is a list (several prompts, or n > 1). texts_in_logprobs: with the texts of
    the tokens. prompt_ids: return those, too."""

    asks: tuple[Ask, ...]
    as_list: bool
    stream: bool
    texts_in_logprobs: bool
    prompt_ids: bool


def parse_generate(body: dict[str, Any], max_prompts: int) -> GenerateCall:
    """Validate a body. Raises InvalidRequest naming the field."""
    refuse(body, REFUSED)
    field, prompts, many = _prompts(body)
    if len(prompts) > max_prompts:
        raise InvalidRequest(field, f"{len(prompts)} prompts", f"at most {max_prompts} prompts in one call")
    count = len(prompts)
    stream, texts = flag(body, "stream"), flag(body, "return_text_in_logprobs")
    wishes = _wishes(body, count)
    wanted = per_prompt(body, "return_logprob", count, bool, False)
    tops = _tops(body, count)
    ids = _id_lists(body, count)
    starts = _starts(body, count)
    names = labels(body, count)
    ranks = priorities(body, count)
    spaces = namespaces(body, count)
    if any(wish.trace for wish in wishes) and not stream:
        raise InvalidRequest("sampling_params.custom_params.trace", True, "true with `stream` only")
    asks: list[Ask] = []
    for i, prompt in enumerate(prompts):
        params = wishes[i].sampling
        of_select = texts and many and field == "text" and params.max_new_tokens == 0
        ask = Ask(
            prompt=prompt,
            sampling=params.model_copy(update={"n": 1}),
            field=f"{field}.{i}" if many else field,
            label=names[i],
            score_start=_score_start(starts[i], params, of_select) if wanted[i] else None,
            output_logprobs=wanted[i],
            top_logprobs=tops[i] if wanted[i] else 0,
            logprob_ids=ids[i] if wanted[i] else (),
            trace=wishes[i].trace,
            namespace=spaces[i],
            priority=ranks[i],
        )
        asks.extend(copies(ask, params.n))
    if len(asks) > max_prompts:
        raise InvalidRequest("sampling_params.n", f"{len(asks)} prompts times n", f"at most {max_prompts} in one call")
    return GenerateCall(tuple(asks), many or len(asks) > 1, stream, texts, flag(body, "return_prompt_token_ids"))


def _score_start(start: int | None, params: SamplingParams, of_select: bool) -> int | None:
    """First prompt position to report, or None for outputs only.

    A call with the signature of the frontend's `select` gets one entry less: that client takes the first entry for the
    last token of the common prefix, two tokens after the start that it asks for.
    """
    if start is None:
        return 0 if params.max_new_tokens == 0 else None
    if start == -1:
        return None
    return start + 1 if of_select and start > 0 else start


def copies(ask: Ask, n: int) -> list[Ask]:
    """The n samples of one prompt; with a seed, each gets its own, or all would be equal."""
    seed = ask.sampling.sampling_seed
    if n == 1 or seed is None:
        return [ask] * n
    return [
        replace(ask, sampling=ask.sampling.model_copy(update={"sampling_seed": (seed + i) % 2**63})) for i in range(n)
    ]


def _prompts(body: dict[str, Any]) -> tuple[str, list[str | tuple[int, ...]], bool]:
    """(name of the field, prompts, whether they came as a list)."""
    text, ids = body.get("text"), body.get("input_ids")
    if text is not None and ids is not None:
        raise InvalidRequest("input_ids", ids, "absent beside `text`")
    if text is not None:
        if isinstance(text, str):
            return "text", [text], False
        if isinstance(text, list) and text and all(isinstance(t, str) for t in text):
            return "text", list(text), True
        raise InvalidRequest("text", text, "a string or a non-empty list of strings")
    if ids is None:
        raise InvalidRequest("text", None, "a prompt, in `text` or `input_ids`")
    if isinstance(ids, list) and all(type(i) is int for i in ids):
        return "input_ids", [tuple(ids)], False
    if isinstance(ids, list) and all(isinstance(row, list) and all(type(i) is int for i in row) for row in ids):
        return "input_ids", [tuple(row) for row in ids], True
    raise InvalidRequest("input_ids", ids, "a list of integers or a non-empty list of such lists")


def _wishes(body: dict[str, Any], count: int) -> list[Wishes]:
    given = body.get("sampling_params")
    shared = mapping(body, "custom_params")
    if isinstance(given, list):
        if len(given) != count:
            raise InvalidRequest("sampling_params", f"{len(given)} objects", f"one, or one for each of {count} prompts")
        return [parse_wishes(item, shared, f"sampling_params.{i}") for i, item in enumerate(given)]
    return [parse_wishes(given, shared)] * count


def _starts(body: dict[str, Any], count: int) -> list[int | None]:
    value = body.get("logprob_start_len")
    values = value if isinstance(value, list) else [value] * count
    if values == [None]:  # an old client's unset default
        values = [None] * count
    if len(values) != count:
        raise InvalidRequest("logprob_start_len", value, f"one integer, or one for each of {count} prompts")
    for start in values:
        if start is not None and (type(start) is not int or not -1 <= start <= MAX_COUNT):
            raise InvalidRequest("logprob_start_len", start, "a prompt position, or -1 (outputs only)")
    return values


def _tops(body: dict[str, Any], count: int) -> list[int]:
    tops = per_prompt(body, "top_logprobs_num", count, int, 0)
    for top in tops:
        if not 0 <= top <= MAX_ALTERNATIVES:
            raise InvalidRequest("top_logprobs_num", top, f"0 to {MAX_ALTERNATIVES}")
    return tops


def _id_lists(body: dict[str, Any], count: int) -> list[tuple[int, ...]]:
    """`token_ids_logprob`: ids for all prompts, or a list (or null) for each."""
    name = "token_ids_logprob"
    value = None if body.get(name) == [None] else body.get(name)
    each = isinstance(value, list) and any(isinstance(row, list) for row in value)
    rows = value if each and isinstance(value, list) else [value] * count
    if len(rows) != count or not all(row is None or _are_ids(row) for row in rows):
        allowed = f"at most {MAX_ALTERNATIVES} token ids, or such a list for each of {count} prompts"
        raise InvalidRequest(name, value, allowed)
    return [tuple(row or ()) for row in rows]


def _are_ids(row: Any) -> bool:
    return (
        isinstance(row, list) and len(row) <= MAX_ALTERNATIVES and all(type(i) is int and 0 <= i < 2**31 for i in row)
    )
