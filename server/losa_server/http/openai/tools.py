"""The tools of a chat request: which are offered to the model, and under which names it may call them."""

from __future__ import annotations

from typing import Any, NamedTuple

from losa_runtime.core.errors import InvalidRequest

Json = dict[str, Any]
MAX_TOOLS = 128


class Tools(NamedTuple):
    """offered: as the chat template takes them. names: of the functions."""

    offered: list[Json]
    names: tuple[str, ...]


def parse_tools(body: Json) -> Tools:
    """`tools` and `tool_choice`; with "none" the model does not hear of the tools. Raises InvalidRequest."""
    choice = body.get("tool_choice")
    if choice not in (None, "none", "auto"):
        allowed = "'none' or 'auto' (a call cannot be enforced in this version)"
        raise InvalidRequest("tool_choice", choice, allowed)
    given = body.get("tools")
    if given is None or given == []:
        return Tools([], ())
    if not isinstance(given, list) or len(given) > MAX_TOOLS:
        raise InvalidRequest("tools", given, f"a list of at most {MAX_TOOLS} tools")
    names = tuple(_name(tool, f"tools.{i}") for i, tool in enumerate(given))
    if body.get("parallel_tool_calls") is False:
        raise InvalidRequest("parallel_tool_calls", False, "true or null (several calls cannot be ruled out)")
    return Tools([], ()) if choice == "none" else Tools(given, names)


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
            raise InvalidRequest(
                f"{where}.function.{field}", function[field], "a string" if kind is str else "a schema"
            )
    if function.get("strict"):
        raise InvalidRequest(f"{where}.function.strict", function["strict"], "false (schemas cannot be enforced)")
    return name
