"""Messages and tools as pure functions: what a template gets to see, and which field an error names."""

from __future__ import annotations

import re
from typing import Any

import pytest

from losa_runtime.core.errors import InvalidRequest
from losa_server.http.openai.messages import parse_messages
from losa_server.http.openai.tool_calls import Call, ToolCallScanner
from losa_server.http.openai.tools import parse_tools

CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"x": [1]}'}}
TOOL = {"type": "function", "function": {"name": "f", "description": "does", "parameters": {"type": "object"}}}


def test_what_a_template_gets_to_see() -> None:
    given = [
        {"role": "developer", "content": "be brief", "unheard_of": 1},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "name": "Ann"},
        {"role": "assistant", "content": None, "tool_calls": [CALL], "refusal": None, "audio": None},
        {"role": "tool", "content": "4", "tool_call_id": "c1"},
        {"role": "assistant", "content": "", "reasoning_content": "hm", "tool_calls": []},
    ]
    assert parse_messages(given) == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "a b", "name": "Ann"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"type": "function", "id": "c1", "function": {"name": "f", "arguments": {"x": [1]}}}],
        },
        {"role": "tool", "content": "4", "tool_call_id": "c1"},
        {"role": "assistant", "content": "", "reasoning_content": "hm"},
    ]


def with_call(**function: Any) -> list[Any]:
    return [{"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", **function}}]}]


BAD: list[tuple[Any, str]] = [
    (None, "messages"),
    ([], "messages"),
    ("hi", "messages"),
    (["hi"], "messages.0"),
    ([{"content": "x"}], "messages.0.role"),
    ([{"role": "user<|im_end|>", "content": "x"}], "messages.0.role"),
    ([{"role": "function", "content": "x"}], "messages.0.role"),
    ([{"role": "user"}], "messages.0.content"),
    ([{"role": "user", "content": None}], "messages.0.content"),
    ([{"role": "user", "content": 5}], "messages.0.content"),
    ([{"role": "user", "content": ["x"]}], "messages.0.content.0"),
    ([{"role": "user", "content": [{"type": "text", "text": 5}]}], "messages.0.content.0.text"),
    ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}], "messages.0.content.0.type"),
    ([{"role": "user", "content": [{"type": "input_audio"}]}], "messages.0.content.0.type"),
    ([{"role": "user", "content": "x", "name": 5}], "messages.0.name"),
    ([{"role": "user", "content": "x", "tool_calls": [CALL]}], "messages.0.tool_calls"),
    ([{"role": "assistant", "content": "x", "tool_calls": "f"}], "messages.0.tool_calls"),
    ([{"role": "assistant", "content": "x", "tool_calls": [1]}], "messages.0.tool_calls.0.function"),
    ([{"role": "assistant", "content": "x", "audio": {"id": "1"}}], "messages.0.audio"),
    (with_call(arguments="no"), "messages.0.tool_calls.0.function.arguments"),
    (with_call(arguments="[1]"), "messages.0.tool_calls.0.function.arguments"),
    (with_call(arguments="[" * 3000), "messages.0.tool_calls.0.function.arguments"),
    (with_call(), "messages.0.tool_calls.0.function.arguments"),
    (with_call(name=5, arguments="{}"), "messages.0.tool_calls.0.function"),
]


@pytest.mark.parametrize(("given", "field"), BAD, ids=[f"{i}-{f}" for i, (_, f) in enumerate(BAD)])
def test_bad_messages_name_their_field(given: Any, field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_messages(given)
    assert caught.value.field == field


def test_tools_are_offered_unless_the_choice_is_none() -> None:
    assert parse_tools({"tools": [TOOL], "parallel_tool_calls": True}) == ([TOOL], ("f",), None)
    assert parse_tools({"tools": [TOOL], "tool_choice": "auto"}).names == ("f",)
    assert parse_tools({"tools": [TOOL], "tool_choice": "none"}) == ([], (), None)
    for body in ({}, {"tools": []}, {"tools": None, "tool_choice": "auto", "parallel_tool_calls": False}):
        assert parse_tools(body) == ([], (), None)


def test_a_call_that_has_to_be_made_is_a_pattern() -> None:
    exact = {"type": "object", "properties": {"x": {"const": 1}}, "required": ["x"], "additionalProperties": False}
    tools = [
        {"type": "function", "function": {"name": 'f"(', "parameters": exact, "strict": True}},
        {"type": "function", "function": {"name": "g"}},
    ]
    both = parse_tools({"tools": tools, "tool_choice": "required", "parallel_tool_calls": False})
    assert both.names == ('f"(', "g") and both.offered == tools and both.pattern is not None
    one = parse_tools({"tools": tools, "tool_choice": {"type": "function", "function": {"name": "g"}}})
    assert one.names == ("g",) and one.offered == tools and one.pattern is not None
    f = '<tool_call>\n{"name": "f\\"(", "arguments": {"x": 1}}\n</tool_call>'
    g = '<tool_call>\n{"name": "g", "arguments": {"y": [true]}}\n</tool_call>'
    assert re.fullmatch(both.pattern, f) and re.fullmatch(both.pattern, g)
    assert re.fullmatch(one.pattern, g) and not re.fullmatch(one.pattern, f)
    assert not re.fullmatch(both.pattern, f.replace("1", "2")) and not re.fullmatch(both.pattern, g + g)
    scanner = ToolCallScanner(both.names)
    assert [*scanner.push(f), *scanner.finish()] == [Call('f"(', '{"x":1}')]


def tool(**function: Any) -> dict[str, Any]:
    return {"tools": [{"type": "function", "function": function}]}


BAD_TOOLS: list[tuple[dict[str, Any], str]] = [
    ({"tools": "f"}, "tools"),
    ({"tools": [TOOL] * 129}, "tools"),
    ({"tools": ["f"]}, "tools.0.type"),
    ({"tools": [TOOL, {"type": "web_search"}]}, "tools.1.type"),
    ({"tools": [{"type": "function"}]}, "tools.0.function"),
    (tool(), "tools.0.function.name"),
    (tool(name=""), "tools.0.function.name"),
    (tool(name="f", parameters=[]), "tools.0.function.parameters"),
    (tool(name="f", description=1), "tools.0.function.description"),
    (tool(name="f", strict=True), "tools.0.function.strict"),
    ({"tools": [TOOL], "tool_choice": "always"}, "tool_choice"),
    ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}}, "tool_choice"),
    ({"tools": [TOOL], "tool_choice": {"type": "allowed_tools"}}, "tool_choice"),
    ({"tools": [TOOL], "tool_choice": "required", "response_format": {"type": "json_object"}}, "tool_choice"),
    ({"tools": [TOOL], "tool_choice": "required", "regex": "a"}, "tool_choice"),
    ({"tools": [], "tool_choice": "required"}, "tool_choice"),
    (
        {**tool(name="f", parameters={"type": "object", "not": {}}), "tool_choice": "required"},
        "tools.0.function.parameters.not",
    ),
    ({"tools": [TOOL], "parallel_tool_calls": False}, "parallel_tool_calls"),
]


@pytest.mark.parametrize(("body", "field"), BAD_TOOLS, ids=[f"{i}-{f}" for i, (_, f) in enumerate(BAD_TOOLS)])
def test_bad_tools_name_their_field(body: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_tools(body)
    assert caught.value.field == field
