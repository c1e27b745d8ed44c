"""The tools of a chat request: which are offered to the model, which it may call, and whether it has to.

A call that has to be made is a constraint on the whole output, a pattern: exactly one call, of one of the tools that
may be called, with arguments that are valid under its schema. Otherwise the model is free to call or not.
"""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from losa_runtime.core.errors import InvalidRequest
from losa_runtime.grammar.json_schema import UnsupportedSchema, any_object, literal, schema_pattern
from losa_server.http.openai.tool_calls import CLOSE, OPEN

Json = dict[str, Any]
MAX_TOOLS = 128
CHOICES = "'none', 'auto', 'required' or {'type': 'function', 'function': {'name': …}} with the name of a tool"
# What else shapes the whole output; two such wishes cannot both be honoured.
SHAPES = ("response_format", "regex", "json_schema", "ebnf", "structural_tag")


class Tools(NamedTuple):
    """offered: as the chat template takes them. names: of the functions that may be called. pattern: what the output
    must match, if a call has to be made."""

    offered: list[Json]
    names: tuple[str, ...]
    pattern: str | None = None


def parse_tools(body: Json) -> Tools:
    """`tools` and `tool_choice`; with "none" the model does not hear of the tools. Raises InvalidRequest."""
    given, choice = body.get("tools"), body.get("tool_choice")
    if given is None or given == []:
        if choice not in (None, "none", "auto"):
            raise InvalidRequest("tool_choice", choice, "'none' or 'auto' without `tools`")
        return Tools([], ())
    if not isinstance(given, list) or len(given) > MAX_TOOLS:
        raise InvalidRequest("tools", given, f"a list of at most {MAX_TOOLS} tools")
    names = tuple(_name(tool, f"tools.{i}") for i, tool in enumerate(given))
    if choice == "none":
        return Tools([], ())
    if choice in (None, "auto"):
        _refuse_promises(body, given)
        return Tools(given, names)
    callable_ = [i for i, name in enumerate(names) if choice == "required" or name == _chosen(choice)]
    if not callable_:
        raise InvalidRequest("tool_choice", choice, CHOICES)
    shape = next((name for name in SHAPES if body.get(name) not in (None, "", {"type": "text"})), None)
    if shape is not None:
        raise InvalidRequest("tool_choice", choice, f"'none' or 'auto' beside `{shape}`")
    calls = "|".join(_call_pattern(given[i]["function"], f"tools.{i}") for i in callable_)
    return Tools(given, tuple(names[i] for i in callable_), f"(?:{calls})")


def _refuse_promises(body: Json, tools: list[Json]) -> None:
    """What is only certain when the output is constrained."""
    forced = "or a `tool_choice` that makes the model call"
    if body.get("parallel_tool_calls") is False:
        raise InvalidRequest("parallel_tool_calls", False, f"true or null, {forced}")
    for i, tool in enumerate(tools):
        if tool["function"].get("strict"):
            raise InvalidRequest(f"tools.{i}.function.strict", tool["function"]["strict"], f"false, {forced}")


def _chosen(choice: Any) -> str | None:
    function = choice.get("function") if isinstance(choice, dict) and choice.get("type") == "function" else None
    return function.get("name") if isinstance(function, dict) else None


def _call_pattern(function: Json, where: str) -> str:
    head = f'{OPEN}\n{{"name": {json.dumps(function["name"], ensure_ascii=False)}, "arguments": '
    try:
        arguments = schema_pattern(function["parameters"]) if function.get("parameters") else any_object()
    except UnsupportedSchema as error:
        field = f"{where}.function.parameters{error.where.replace('/', '.')}"
        raise InvalidRequest(field, error.found, error.allowed) from None
    return literal(head) + arguments + literal(f"}}\n{CLOSE}")


def _name(tool: Any, where: str) -> str:
    if not isinstance(tool, dict) or tool.get("type") != "function":
        raise InvalidRequest(f"{where}.type", tool.get("type") if isinstance(tool, dict) else tool, "'function'")
    function = tool.get("function")
    if not isinstance(function, dict):
        raise InvalidRequest(f"{where}.function", function, "an object")
    name = function.get("name")
    if not isinstance(name, str) or not name:
        raise InvalidRequest(f"{where}.function.name", name, "a name")
    for field, kind in (("description", str), ("parameters", dict)):
        if not isinstance(function.get(field), kind | None):
            allowed = "a string" if kind is str else "a JSON schema"
            raise InvalidRequest(f"{where}.function.{field}", function[field], allowed)
    return name
