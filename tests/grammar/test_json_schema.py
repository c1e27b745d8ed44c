"""What a schema's automaton lets through is valid under that schema; what cannot be served is refused by keyword."""

from __future__ import annotations

import json
import random
import re
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from losa_runtime.grammar.automaton import ByteAutomaton
from losa_runtime.grammar.compile_worker import compile_pattern
from losa_runtime.grammar.json_numbers import integer_range
from losa_runtime.grammar.json_schema import UnsupportedSchema, any_object, schema_pattern
from tests.grammar.schemas import REALISTIC, SCHEMAS


def some_match(automaton: ByteAutomaton, rng: random.Random, wander: int) -> str:
    """A random text that matches: `wander` random bytes, then the shortest way to an end."""
    state, text = 0, bytearray()
    while True:
        steps = [b for b in range(256) if automaton.next_SC[state, automaton.class_B[b]] >= 0]
        home = automaton.accepting_S[state] and (len(text) >= wander or not steps or rng.random() < 0.2)
        if home:
            return text.decode()
        left = automaton.bytes_left_S
        behind = {b: int(automaton.next_SC[state, automaton.class_B[b]]) for b in steps}
        if len(text) >= wander:
            steps = [b for b in steps if left[behind[b]] < left[state]]
        text.append(rng.choice(steps))
        state = behind[text[-1]]


def check(schema: Any, seed: int, texts: int) -> None:
    automaton = compile_pattern(schema_pattern(schema))
    rng = random.Random(seed)
    validator = jsonschema.Draft202012Validator(schema, format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER)
    for _ in range(texts):
        text = some_match(automaton, rng, rng.choice([0, 5, 60]))
        validator.validate(json.loads(text))


@given(SCHEMAS, st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_whatever_matches_is_valid(schema: Any, seed: int) -> None:
    check(schema, seed, texts=4)


@pytest.mark.parametrize("name", REALISTIC)
def test_whatever_matches_a_realistic_schema_is_valid(name: str) -> None:
    check(REALISTIC[name], seed=1, texts=12)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("person", {"name": 'Zoë "Z"', "age": 41}),
        ("person", {"name": "A", "age": 130, "email": "a.b@c-d.org"}),
        ("verdict", {"answer": "nein, «ça»"}),
        ("table", [["ab", True], ["", False]]),
        ("scores", {}),
        ("scores", {"x": -5, "y z": 0}),
        ("either", "2024-02-28"),
        ("either", [1, -20]),
    ],
)
def test_valid_documents_match(name: str, value: Any) -> None:
    automaton = compile_pattern(schema_pattern(REALISTIC[name]))
    for separators in ((",", ":"), (", ", ": ")):
        state = automaton.walk(json.dumps(value, ensure_ascii=False, separators=separators).encode())
        assert state >= 0 and automaton.accepting_S[state]


@pytest.mark.parametrize(
    "text", ['{"name":"A","age":131}', '{"age":1,"name":"A"}', '{"name":"","age":1}', '{"name":"A"}']
)
def test_other_documents_do_not_match(text: str) -> None:
    automaton = compile_pattern(schema_pattern(REALISTIC["person"]))
    state = automaton.walk(text.encode())
    assert state < 0 or not automaton.accepting_S[state]


@pytest.mark.parametrize(
    ("schema", "where"),
    [
        (
            {"type": "object", "properties": {"a": {"type": "string", "contentEncoding": "x"}}},
            "/properties/a/contentEncoding",
        ),
        ({"type": "array", "items": {"type": "integer"}, "uniqueItems": True}, "/uniqueItems"),
        ({"type": "integer", "multipleOf": 3}, "/multipleOf"),
        ({"type": "number", "maximum": 3}, "/maximum"),
        ({"type": "number", "minimum": 0.5}, "/minimum"),
        ({"not": {"type": "null"}}, ""),
        ({"$ref": "#"}, "/$ref"),
        ({"$defs": {"n": {"properties": {"n": {"$ref": "#/$defs/n"}}}}, "$ref": "#/$defs/n"}, "/properties/n/$ref"),
        ({"$ref": "other.json"}, "/$ref"),
        ({"type": "text"}, "/type"),
        ({"enum": []}, "/enum"),
        ({"type": "string", "format": "hostname"}, "/format"),
        ({"type": "string", "pattern": 'a"'}, "/pattern"),
        ({"type": "string", "pattern": "a|b"}, "/pattern"),
        ({"type": "string", "pattern": 5}, "/pattern"),
        ({"type": "string", "pattern": "a", "maxLength": 3}, ""),
        ({"type": "object", "properties": {}, "required": ["a"]}, "/required"),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "/oneOf"),
        ({"allOf": [{"type": "integer"}, {"minimum": 3}]}, "/allOf"),
        ({"type": "integer", "minimum": 5, "maximum": 4}, ""),
        ({"type": "array", "minItems": 3, "prefixItems": [{}], "items": False}, "/minItems"),
        (False, ""),
        (3, ""),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(schema: Any, where: str) -> None:
    with pytest.raises(UnsupportedSchema) as refusal:
        schema_pattern(schema)
    assert refusal.value.where == where and refusal.value.allowed


def test_deep_and_wide_schemas_are_refused() -> None:
    deep: Any = {"type": "null"}
    for _ in range(2000):
        deep = {"type": "array", "items": deep}
    wide = {"properties": {f"p{i}": {"type": "string", "minLength": 1} for i in range(400)}}
    for schema in (deep, wide):
        with pytest.raises(UnsupportedSchema, match="allowed: at most"):
            schema_pattern(schema)


def test_any_object_nests() -> None:
    automaton = compile_pattern(any_object())
    for value in ({}, {"a": 1, "b": [True, None]}, {"a": {"b": 1.5e3}}):
        state = automaton.walk(json.dumps(value).encode())
        assert state >= 0 and automaton.accepting_S[state]


@given(
    st.one_of(st.none(), st.integers(-2500, 2500)),
    st.one_of(st.none(), st.integers(-2500, 2500)),
    st.integers(-30000, 30000),
)
@settings(max_examples=300, deadline=None)
def test_integers_between_bounds(low: int | None, high: int | None, number: int) -> None:
    if low is not None and high is not None and low > high:
        low, high = high, low
    wanted = (low is None or number >= low) and (high is None or number <= high)
    pattern = integer_range(low, high)
    assert (re.fullmatch(pattern, str(number)) is not None) == wanted
    assert re.fullmatch(pattern, "-0") is None and re.fullmatch(pattern, f"0{abs(number)}") is None


@pytest.mark.timeout(60)
@pytest.mark.parametrize("leaf", [{"type": "null"}, {"const": "x" * 2000}])
@pytest.mark.parametrize("branch", ["properties", "anyOf"])
def test_references_that_multiply_are_refused_in_time(leaf: dict[str, Any], branch: str) -> None:
    """Each definition uses the next one twice: two dozen of them would be followed millions of times."""
    definitions: dict[str, Any] = {"d24": leaf}
    for i in range(24):
        twice = [{"$ref": f"#/$defs/d{i + 1}"}] * 2
        both = {"type": "object", "properties": {"a": twice[0], "b": twice[1]}, "additionalProperties": False}
        definitions[f"d{i}"] = both if branch == "properties" else {"anyOf": twice}
    with pytest.raises(UnsupportedSchema):
        schema_pattern({"$ref": "#/$defs/d0", "$defs": definitions})
