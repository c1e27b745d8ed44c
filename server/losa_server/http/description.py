"""The OpenAPI description of the routes: what bodies look like and how errors do. For readers and for fuzzers.

The routes read their bodies themselves, so that each refusal names a field; here is said once what they take. Fields
that are not named are ignored, and null means the default everywhere.
"""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from losa_runtime.core.sampling_params import SamplingParams
from losa_server.http.guard import OPEN

Schema = dict[str, Any]
METHODS = ("get", "post", "put")
STREAMED = frozenset({"/generate", "/v1/completions", "/v1/chat/completions"})
PLAIN = frozenset({"/flush_cache", "/metrics"})


def _ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def _or_null(*choices: Schema) -> Schema:
    return {"anyOf": [*choices, {"type": "null"}]}


def _list(items: Schema, **more: Any) -> Schema:
    return {"type": "array", "items": items, **more}


def _object(required: tuple[str, ...] = (), **fields: Schema) -> Schema:
    return {"type": "object", "properties": fields, "required": list(required)}


TEXT: Schema = {"type": "string"}
NAME: Schema = {"type": "string", "maxLength": 256}
FLAG = _or_null({"type": "boolean"})
COUNT = _or_null({"type": "integer", "minimum": 0, "maximum": 2**31 - 1})
IDS = _list({"type": "integer", "minimum": 0})
BIAS: Schema = {
    "type": "object",
    "propertyNames": {"pattern": "^[0-9]{1,9}$"},
    "additionalProperties": {"type": "number", "minimum": -10000, "maximum": 10000},
    "maxProperties": 300,
}
SHARED: Schema = {
    "stream": FLAG,
    "rid": _or_null(NAME),
    "extra_key": _or_null(NAME),
    "cache_salt": _or_null(NAME),
    "priority": _or_null({"type": "integer", "minimum": -(2**31) + 1, "maximum": 2**31 - 1}),
    "custom_params": _or_null(_ref("DiffusionParams")),
}
NATIVE: Schema = dict(
    **SHARED,
    sampling_params=_or_null(_ref("SamplingParams"), _list(_ref("SamplingParams"))),
    return_logprob=FLAG,
    logprob_start_len=_or_null({"type": "integer", "minimum": -1, "maximum": 2**31 - 1}),
    top_logprobs_num=COUNT,
    token_ids_logprob=_or_null(IDS),
    return_text_in_logprobs=FLAG,
    return_prompt_token_ids=FLAG,
)
GENERATE: Schema = {
    "anyOf": [
        _object(("text",), text={"anyOf": [TEXT, _list(TEXT, minItems=1)]}, **NATIVE),
        _object(("input_ids",), input_ids={"anyOf": [IDS, _list(IDS, minItems=1)]}, **NATIVE),
    ]
}
OPENAI: Schema = {
    **SHARED,
    "model": _or_null(TEXT),
    "max_tokens": COUNT,
    "max_completion_tokens": COUNT,
    "n": _or_null({"type": "integer", "minimum": 1, "maximum": 8}),
    "seed": _or_null({"type": "integer"}),
    "stop": _or_null(NAME, _list(NAME, maxItems=16)),
    "temperature": _or_null({"type": "number", "minimum": 0, "maximum": 100}),
    "top_p": _or_null({"type": "number", "exclusiveMinimum": 0, "maximum": 1}),
    "frequency_penalty": _or_null({"type": "number", "minimum": -2, "maximum": 2}),
    "presence_penalty": _or_null({"type": "number", "minimum": -2, "maximum": 2}),
    "logit_bias": _or_null(BIAS),
    "stream_options": _or_null(_object(include_usage=FLAG, continuous_usage_stats=FLAG)),
    "response_format": _or_null(
        _object(("type",), type={"enum": ["text", "json_object", "json_schema"]}, json_schema={"type": "object"})
    ),
    "user": _or_null(TEXT),
}
TOP: Schema = {"type": "integer", "minimum": 0, "maximum": 20}
COMPLETION = _object(
    ("prompt",),
    **OPENAI,
    prompt={"anyOf": [TEXT, IDS, _list(TEXT, minItems=1), _list(IDS, minItems=1)]},
    logprobs=_or_null(TOP),
    echo=FLAG,
    best_of=COUNT,
)
PART = _object(("type", "text"), type={"const": "text"}, text=TEXT)
MESSAGE = _object(
    ("role",),
    role={"enum": ["system", "developer", "user", "assistant", "tool"]},
    content=_or_null(TEXT, _list(PART)),
    tool_calls=_or_null(_list({"type": "object"})),
    tool_call_id=_or_null(TEXT),
    name=_or_null(TEXT),
)
FUNCTION = _object(("name",), name=TEXT, description=_or_null(TEXT), parameters=_or_null({"type": "object"}))
CHAT = _object(
    ("messages",),
    **OPENAI,
    messages=_list(MESSAGE, minItems=1),
    tools=_or_null(_list(_object(("type", "function"), type={"const": "function"}, function=FUNCTION))),
    tool_choice=_or_null({"enum": ["none", "auto", "required"]}, {"type": "object"}),
    logprobs=FLAG,
    top_logprobs=_or_null(TOP),
    chat_template_kwargs=_or_null({"type": "object", "additionalProperties": {"type": "boolean"}}),
)
TOKENIZE = _object(prompt=_or_null(TEXT, _list(TEXT)), text=_or_null(TEXT, _list(TEXT)))
DETOKENIZE = _object(("tokens",), tokens={"anyOf": [IDS, _list(IDS)]}, skip_special_tokens={"type": "boolean"})
ABORT = _object(rid=_or_null(TEXT), abort_all=FLAG)
BODIES: dict[str, Schema] = {
    "/generate": GENERATE,
    "/v1/completions": COMPLETION,
    "/v1/chat/completions": CHAT,
    "/tokenize": TOKENIZE,
    "/v1/tokenize": TOKENIZE,
    "/detokenize": DETOKENIZE,
    "/v1/detokenize": DETOKENIZE,
    "/abort_request": ABORT,
}
ERROR = _object(
    ("error",),
    error=_object(
        ("message", "type", "param", "code"),
        message=TEXT,
        type=TEXT,
        param=_or_null(TEXT),
        code={"anyOf": [{"type": "integer"}, TEXT]},
    ),
)


def describe(app: FastAPI, with_keys: bool) -> None:
    """Give the application its description. with_keys: routes need a key."""
    made: Schema = {}

    def openapi() -> Schema:
        if not made:
            made.update(_describe(app, with_keys))
        return made

    app.openapi = openapi  # type: ignore[method-assign]


def _describe(app: FastAPI, with_keys: bool) -> Schema:
    description = get_openapi(title=app.title, version=app.version, routes=app.routes)
    components = description.setdefault("components", {})
    components["schemas"] = {**_parameters(), "Error": ERROR}
    if with_keys:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    for path, methods in description["paths"].items():
        for method in METHODS:
            if method in methods:
                _operation(methods[method], path, method)
                if with_keys and path not in OPEN:
                    methods[method]["security"] = [{"key": []}]
    return description


def _operation(operation: Schema, path: str, method: str) -> None:
    kinds = ["text/plain"] if path in PLAIN else ["application/json"]
    kinds += ["text/event-stream"] if path in STREAMED else []
    error = {"description": "An error", "content": {"application/json": {"schema": _ref("Error")}}}
    success = {"description": "Success", "content": {kind: {} for kind in kinds}}
    operation["responses"] = {"200": success, "4XX": error, "5XX": error}
    if method != "get" and path in BODIES:
        operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": BODIES[path]}}}
    if path == "/flush_cache":
        seconds = {"type": "number", "minimum": 0, "maximum": 600}
        operation["parameters"] = [{"name": "timeout", "in": "query", "required": False, "schema": seconds}]


def _parameters() -> dict[str, Schema]:
    """SamplingParams and DiffusionParams as clients may send them."""
    ours = SamplingParams.model_json_schema(ref_template="#/components/schemas/{model}")
    inner = ours.pop("$defs")
    ours.pop("additionalProperties")  # unknown names are dropped
    for name, schema in ours["properties"].items():
        ours["properties"][name] = _or_null(schema)
    ours["properties"]["stop"], ours["properties"]["logit_bias"] = OPENAI["stop"], OPENAI["logit_bias"]
    ours["properties"]["stop_token_ids"] = _or_null({"type": "integer"}, {**IDS, "maxItems": 256})
    inner["DiffusionParams"]["properties"]["trace"] = FLAG
    return {"SamplingParams": ours, **inner}
