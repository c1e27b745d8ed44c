"""The body of POST /generate: what is accepted, in SGLang's names, and how it becomes one Ask per prompt.

Pure functions from JSON values to Asks. Unknown fields are ignored, because routers and newer clients add some; known
ones that cannot be honoured are refused by name. Knows no sockets and no engine.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from losa_runtime.core.errors import InvalidRequest
from losa_runtime.core.sampling_params import REFUSED as REFUSED_PARAMS
from losa_runtime.core.sampling_params import DiffusionParams, SamplingParams
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
    "return_prompt_token_ids": "false",
    "session_params": "null (use the prefix cache: send the whole text again)",
    "top_logprobs_num": "0 (only the log-probability of the token itself is reported)",
    "token_ids_logprob": "null (only the log-probability of the token itself is reported)",
    "bootstrap_host": "null (prefill and decoding share one engine)",
    "bootstrap_room": "null (prefill and decoding share one engine)",
}
KNOWN_PARAMS = frozenset(SamplingParams.model_fields) | frozenset(REFUSED_PARAMS)
KNOWN_CUSTOM = frozenset(DiffusionParams.model_fields)


@dataclass(frozen=True)
class GenerateCall:
    """A validated body. as_list: the answer is a list (several prompts, or n > 1). texts: token texts in logprobs."""

    asks: tuple[Ask, ...]
    as_list: bool
    stream: bool
    return_logprob: tuple[bool, ...]
    texts_in_logprobs: bool


def parse_generate(body: dict[str, Any], max_prompts: int) -> GenerateCall:
    """Validate a body. Raises InvalidRequest naming the field."""
    for name, allowed in REFUSED.items():
        if not _asks_for_nothing(body.get(name)):
            raise InvalidRequest(name, body[name], allowed)
    field, prompts, many = _prompts(body)
    if len(prompts) > max_prompts:
        raise InvalidRequest(field, f"{len(prompts)} prompts", f"at most {max_prompts} prompts in one call")
    count = len(prompts)
    texts = _flag(body, "return_text_in_logprobs")
    params = _sampling(body, count)
    wanted = _per_prompt(body, "return_logprob", count, bool, False)
    starts = _starts(body, count)
    labels = _labels(body, count)
    priorities = _per_prompt(body, "priority", count, int, 0)
    namespaces = _namespaces(body, count)
    asks: list[Ask] = []
    logprobs: list[bool] = []
    for i, prompt in enumerate(prompts):
        of_select = texts and many and field == "text" and params[i].max_new_tokens == 0
        ask = Ask(
            prompt=prompt,
            sampling=params[i].model_copy(update={"n": 1}),
            field=f"{field}.{i}" if many else field,
            label=labels[i],
            score_start=_score_start(starts[i], params[i], of_select) if wanted[i] else None,
            output_logprobs=wanted[i],
            namespace=namespaces[i],
            priority=priorities[i],
        )
        copies = _copies(ask, params[i].n)
        asks.extend(copies)
        logprobs.extend([wanted[i]] * len(copies))
    if len(asks) > max_prompts:
        raise InvalidRequest("sampling_params.n", f"{len(asks)} prompts times n", f"at most {max_prompts} in one call")
    return GenerateCall(tuple(asks), many or len(asks) > 1, _flag(body, "stream"), tuple(logprobs), texts)


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


def _copies(ask: Ask, n: int) -> list[Ask]:
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


def _sampling(body: dict[str, Any], count: int) -> list[SamplingParams]:
    given = body.get("sampling_params")
    shared = body.get("custom_params")
    if shared is not None and not isinstance(shared, dict):
        raise InvalidRequest("custom_params", shared, "an object")
    if isinstance(given, list):
        if len(given) != count:
            raise InvalidRequest("sampling_params", f"{len(given)} objects", f"one, or one for each of {count} prompts")
        return [_one_sampling(item, shared, f"sampling_params.{i}") for i, item in enumerate(given)]
    return [_one_sampling(given, shared, "sampling_params")] * count


def _one_sampling(given: Any, shared: dict[str, Any] | None, where: str) -> SamplingParams:
    """custom_params may also stand beside sampling_params, where some routers leave it; the inner one wins."""
    if given is None:
        given = {}
    if not isinstance(given, dict):
        raise InvalidRequest(where, given, "an object")
    known = {name: value for name, value in given.items() if name in KNOWN_PARAMS}
    custom = known.get("custom_params")
    if custom is not None and not isinstance(custom, dict):
        raise InvalidRequest(f"{where}.custom_params", custom, "an object")
    if shared or custom:
        known["custom_params"] = {**(shared or {}), **(custom or {})}
    return SamplingParams.parse(known, where)


def _starts(body: dict[str, Any], count: int) -> list[int | None]:
    value = body.get("logprob_start_len")
    values = value if isinstance(value, list) else [value] * count
    if values == [None]:  # an old client's unset default
        values = [None] * count
    if len(values) != count:
        raise InvalidRequest("logprob_start_len", value, f"one integer, or one for each of {count} prompts")
    for start in values:
        if start is not None and (type(start) is not int or start < -1):
            raise InvalidRequest("logprob_start_len", start, "an integer from -1 (outputs only)")
    return values


def _labels(body: dict[str, Any], count: int) -> list[str | None]:
    rid = body.get("rid")
    if isinstance(rid, str) and count > 1:
        return [f"{rid}_{i}" for i in range(count)]
    values = rid if isinstance(rid, list) else [rid] * count
    if len(values) != count or not all(v is None or (isinstance(v, str) and len(v) <= 256) for v in values):
        raise InvalidRequest("rid", rid, f"a string, or one for each of {count} prompts, of at most 256 characters")
    return values


def _namespaces(body: dict[str, Any], count: int) -> list[str]:
    """`extra_key` and `cache_salt` both separate prefix caches; requests share one only if both agree."""
    keys = _per_prompt(body, "extra_key", count, str, "")
    salts = _per_prompt(body, "cache_salt", count, str, "")
    return [f"{len(key)}:{key}{salt}" if key or salt else "" for key, salt in zip(keys, salts, strict=True)]


def _per_prompt(body: dict[str, Any], name: str, count: int, kind: type, default: Any) -> list[Any]:
    value = body.get(name)
    values = value if isinstance(value, list) else [value] * count
    values = [default if v is None else v for v in values]
    if values and len(values) == 1:
        values = values * count
    if len(values) != count or not all(type(v) is kind for v in values):
        words = {bool: "a boolean", int: "an integer", str: "a string"}[kind]
        raise InvalidRequest(name, value, f"{words}, or one for each of {count} prompts")
    return values


def _flag(body: dict[str, Any], name: str) -> bool:
    value = body.get(name)
    if value is None:
        return False
    if type(value) is not bool:
        raise InvalidRequest(name, value, "true or false")
    return value


def _asks_for_nothing(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(_asks_for_nothing(item) for item in value)
    return value is None or value is False or value in (0, "", {})
