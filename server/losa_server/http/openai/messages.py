"""The messages of a chat request as a chat template takes them: plain strings, text only. Pure functions.

A template sees `role`, `content` (a string; several text parts are joined by spaces), and where they are given `name`,
`reasoning_content`, `tool_call_id` and `tool_calls` with their arguments as objects. `developer` becomes `system`.
"""

from __future__ import annotations

from typing import Any

from losa_runtime.core.errors import InvalidRequest
from losa_server.http.body import parse_object

Json = dict[str, Any]
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}


def parse_messages(given: Any) -> list[Json]:
    """Validate. Raises InvalidRequest naming the field, e.g. `messages.2.content`."""
    if not isinstance(given, list) or not given:
        raise InvalidRequest("messages", given, "a non-empty list of messages")
    return [_message(message, f"messages.{i}") for i, message in enumerate(given)]


def _message(given: Any, where: str) -> Json:
    if not isinstance(given, dict):
        raise InvalidRequest(where, given, "an object")
    role = given.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise InvalidRequest(f"{where}.role", role, f"one of {', '.join(ROLES)}")
    for name in ("audio", "function_call"):
        if given.get(name) is not None:
            raise InvalidRequest(f"{where}.{name}", given[name], "null (messages are text, calls are `tool_calls`)")
    calls = given.get("tool_calls")
    message: Json = {"role": ROLES[role], "content": _content(given.get("content"), where, optional=bool(calls))}
    for name in ("name", "reasoning_content", "tool_call_id"):
        value = given.get(name)
        if value is not None:
            if not isinstance(value, str):
                raise InvalidRequest(f"{where}.{name}", value, "a string")
            message[name] = value
    if calls:
        if role != "assistant" or not isinstance(calls, list):
            raise InvalidRequest(f"{where}.tool_calls", calls, "a list, in messages of the assistant")
        message["tool_calls"] = [_call(call, f"{where}.tool_calls.{i}") for i, call in enumerate(calls)]
    return message


def _content(given: Any, where: str, optional: bool) -> str:
    if isinstance(given, str):
        return given
    if given is None and optional:
        return ""
    if not isinstance(given, list):
        raise InvalidRequest(f"{where}.content", given, "a string or a list of text parts")
    return " ".join(_part(part, f"{where}.content.{i}") for i, part in enumerate(given))


def _part(part: Any, where: str) -> str:
    if not isinstance(part, dict):
        raise InvalidRequest(where, part, "an object")
    if part.get("type") != "text":
        raise InvalidRequest(f"{where}.type", part.get("type"), "'text' (the models are text only)")
    text = part.get("text")
    if not isinstance(text, str):
        raise InvalidRequest(f"{where}.text", text, "a string")
    return text


def _call(given: Any, where: str) -> Json:
    function = given.get("function") if isinstance(given, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(function, dict) or not isinstance(name, str):
        raise InvalidRequest(f"{where}.function", function, "an object with a name and arguments")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = parse_object(arguments.encode())
        except InvalidRequest as error:
            raise InvalidRequest(f"{where}.function.arguments", arguments, f"{error.allowed}") from None
    if not isinstance(arguments, dict):
        raise InvalidRequest(f"{where}.function.arguments", arguments, "a JSON object, as text")
    call: Json = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return {**call, "id": given["id"]} if isinstance(given.get("id"), str) else call
