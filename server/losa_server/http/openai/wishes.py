"""The sampling fields of OpenAI's bodies as SamplingParams, and errors told in the client's own field names.

SGLang's and this runtime's further fields stand beside OpenAI's. Known fields that cannot be honoured are refused by
name, unknown ones ignored: routers and newer clients add some. Knows no prompt and no answer.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import orjson

from losa_runtime.core.errors import InvalidRequest, LosaError
from losa_runtime.core.sampling_params import SamplingParams
from losa_server.errors import RequestFailed, as_failure
from losa_server.http.fields import mapping, refuse
from losa_server.http.wishes import KNOBS, KNOWN, parse_wishes

# OpenAI's name -> SGLang's. All other names of SamplingParams are the same in both.
_NAMES = {"seed": "sampling_seed", "min_tokens": "min_new_tokens"}
_NATIVE = re.compile(r"sampling_params\.(\w+)")
_NOT_OURS = {"max_new_tokens", "min_new_tokens", "custom_params"}  # native names that mean nothing here
_ALTERNATIVES = "null (use `logprobs` and `top_logprobs`)"
_CONSTRAINTS = "null (use `response_format`)"
REFUSED: dict[str, str] = {
    "suffix": "null (a text is only ever continued at its end)",
    "guided_json": _CONSTRAINTS,
    "guided_regex": _CONSTRAINTS,
    "guided_choice": _CONSTRAINTS,
    "guided_grammar": _CONSTRAINTS,
    "structured_outputs": _CONSTRAINTS,
    "use_beam_search": "false (there is no beam search over a block)",
    "prompt_logprobs": "null (`echo` with `logprobs` gives them in /v1/completions)",
    "allowed_token_ids": "null (`logit_bias` can forbid tokens)",
    "bad_words": "null (`logit_bias` can forbid tokens)",
    "truncate_prompt_tokens": "null (a prompt is taken whole or refused)",
    "lora_path": "null (there are no adapters)",
    "custom_logit_processor": "null (no code is taken from a request)",
    "session_params": "null (use the prefix cache: send the whole text again)",
    "return_hidden_states": "false",
    "return_routed_experts": "false",
    "bootstrap_host": "null (prefill and decoding share one engine)",
    "bootstrap_room": "null (prefill and decoding share one engine)",
    "image_data": "null (the models are text only)",
    "input_embeds": "null (send a text)",
}


class Words(NamedTuple):
    """How this client named things: SGLang's name -> its own."""

    names: dict[str, str]

    def explain(self, error: LosaError) -> RequestFailed:
        """The answer to an error, with the field as the client knows it."""
        failure = as_failure(error)
        field = (failure.field or "").removeprefix("sampling_params.")
        head, dot, rest = field.partition(".")
        if head == "custom_params" and self.names.get(rest) == rest:
            theirs = rest
        else:
            theirs = self.names.get(head, head) + dot + rest
        if failure.field is None:
            return failure
        message = failure.message.replace(failure.field, theirs, 1)
        message = _NATIVE.sub(lambda match: self.names.get(match[1], match[1]), message)
        return RequestFailed(failure.status_code, message, theirs, failure.code)


class ParsedWishes(NamedTuple):
    """The parameters of each of the `n` samples, and how to speak of them."""

    sampling: SamplingParams
    n: int
    words: Words


def parse_body(body: dict[str, Any], limit: tuple[str, ...], default_limit: int | None) -> ParsedWishes:
    """Validate the sampling fields. limit: names under which the most tokens may be given, the first given one counts.

    Raises RequestFailed (400) naming the client's field.
    """
    refuse(body, REFUSED)
    given = {name: body[name] for name in KNOWN - _NOT_OURS if body.get(name) is not None}
    names = {name: name for name in given}
    for theirs, ours in _NAMES.items():
        if body.get(theirs) is not None:
            given[ours], names[ours] = body[theirs], theirs
    names["max_new_tokens"] = next((name for name in limit if body.get(name) is not None), limit[0])
    most = body.get(names["max_new_tokens"])
    given["max_new_tokens"] = default_limit if most is None else most
    constraint = _constraint(body.get("response_format"))
    if constraint:
        given["json_schema"], names["json_schema"] = constraint, "response_format"
    if type(given.get("sampling_seed")) is int:
        given["sampling_seed"] %= 2**63  # OpenAI's seeds may be negative
    knobs = {name: body[name] for name in KNOBS if body.get(name) is not None}
    words = Words({"logprob_start_len": "echo", **names, **{name: name for name in knobs}})
    try:
        wishes = parse_wishes(given, {**mapping(body, "custom_params"), **knobs})
    except InvalidRequest as error:
        raise words.explain(error) from None
    if wishes.trace:
        raise InvalidRequest("custom_params.trace", True, "false (steps are shown by /generate)")
    return ParsedWishes(wishes.sampling.model_copy(update={"n": 1}), wishes.sampling.n, words)


def _constraint(given: Any) -> str | None:
    """`response_format` as a JSON schema; None for plain text. Which schemas can be honoured is the engine's to say."""
    kinds = "{'type': 'text'}, 'json_object' or 'json_schema'"
    if given is None:
        return None
    kind = given.get("type") if isinstance(given, dict) else None
    if kind == "text":
        return None
    if kind == "json_object":
        return '{"type": "object"}'
    if kind != "json_schema":
        raise InvalidRequest("response_format", given, kinds)
    outer = given.get("json_schema")
    schema = outer.get("schema") if isinstance(outer, dict) else None
    if not isinstance(schema, dict | bool):
        raise InvalidRequest("response_format.json_schema.schema", schema, "a JSON schema")
    return orjson.dumps(schema).decode()
