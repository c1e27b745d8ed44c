"""Schemas for the tests: made by hypothesis, and realistic ones written by hand."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

NAMES = st.text('abcé"\\ {}.', min_size=1, max_size=4)
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(-1000, 1000), st.text('ab"\\\né', max_size=3), st.floats(-9, 9)
)


def _bounds(low: str, high: str, most: int) -> st.SearchStrategy[dict[str, int]]:
    def made(pair: tuple[int, int], keep: tuple[bool, bool]) -> dict[str, int]:
        found = {low: min(pair), high: max(pair)}
        return {name: found[name] for name, kept in zip((low, high), keep, strict=True) if kept}

    return st.builds(
        made, st.tuples(st.integers(0, most), st.integers(0, most)), st.tuples(st.booleans(), st.booleans())
    )


def _integers() -> st.SearchStrategy[dict[str, Any]]:
    ends = st.tuples(st.integers(-1200, 1200), st.integers(0, 2500))
    low, high = st.sampled_from(["minimum", "exclusiveMinimum"]), st.sampled_from(["maximum", "exclusiveMaximum"])
    both = st.builds(lambda e, a, b: {a: e[0], b: e[0] + e[1] + 2}, ends, low, high)
    return st.one_of(
        st.just({}), both, st.builds(lambda e, a: {a: e[0]}, ends, low), st.builds(lambda e, b: {b: e[0]}, ends, high)
    )


LEAVES = st.one_of(
    st.just({"type": "boolean"}),
    st.just({"type": "null"}),
    st.just({"type": "number"}),
    st.just({"type": "number", "minimum": 0}),
    st.just({"type": ["string", "null"], "maxLength": 3}),
    _integers().map(lambda bounds: {"type": "integer"} | bounds),
    _bounds("minLength", "maxLength", 4).map(lambda bounds: {"type": "string"} | bounds),
    st.sampled_from(["date", "time", "date-time", "uuid", "ipv4", "email"]).map(
        lambda f: {"type": "string", "format": f}
    ),
    st.sampled_from(["^a+$", "b", r"^\d{2}-[^x]", "[ -~]c", r"^(a|\w\s)$", ".$", r"a\.b"]).map(
        lambda p: {"type": "string", "pattern": p}
    ),
    st.lists(SCALARS, min_size=1, max_size=3).map(lambda values: {"enum": values}),
    st.one_of(SCALARS, st.just({"a": [1, {}]})).map(lambda value: {"const": value}),
)


def _containers(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    def made(properties: dict[str, Any], needed: list[bool], more: bool | None) -> dict[str, Any]:
        required = [name for name, need in zip(properties, needed, strict=False) if need]
        extra = {} if more is None else {"additionalProperties": more}
        return {"type": "object", "properties": properties, "required": required} | extra

    flags = st.lists(st.booleans(), min_size=3, max_size=3)
    objects = st.builds(
        made, st.dictionaries(NAMES, inner, min_size=1, max_size=3), flags, st.sampled_from([None, False])
    )
    arrays = st.builds(
        lambda items, bounds: {"type": "array", "items": items} | bounds, inner, _bounds("minItems", "maxItems", 3)
    )
    tuples = st.builds(lambda heads: {"prefixItems": heads, "items": False}, st.lists(inner, min_size=1, max_size=2))
    maps = inner.map(lambda value: {"type": "object", "additionalProperties": value})
    unions = st.lists(inner, min_size=1, max_size=2).map(lambda parts: {"anyOf": parts})
    return st.one_of(objects, arrays, tuples, maps, unions)


SCHEMAS = st.recursive(LEAVES, _containers, max_leaves=5)

REALISTIC: dict[str, dict[str, Any]] = {
    "person": {
        "type": "object",
        "title": "Person",
        "properties": {
            "name": {"type": "string", "minLength": 1, "maxLength": 12, "description": "full name"},
            "age": {"type": "integer", "minimum": 0, "maximum": 130},
            "email": {"type": "string", "format": "email"},
        },
        "required": ["name", "age"],
        "additionalProperties": False,
    },
    "order": {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$defs": {
            "item": {
                "type": "object",
                "properties": {
                    "sku": {"type": "string", "pattern": "^[A-Z]{3}-[0-9]{4}$"},
                    "count": {"$ref": "#/$defs/n"},
                },
                "required": ["sku", "count"],
            },
            "n": {"type": "integer", "exclusiveMinimum": 0, "maximum": 99},
        },
        "type": "object",
        "properties": {
            "id": {"type": "string", "format": "uuid"},
            "placed": {"type": "string", "format": "date-time"},
            "items": {"type": "array", "items": {"$ref": "#/$defs/item"}, "minItems": 1, "maxItems": 2},
            "status": {"enum": ["new", "paid", "sent", None]},
            "total": {"type": "number", "minimum": 0},
        },
        "required": ["id", "items", "status"],
    },
    "verdict": {
        "anyOf": [
            {
                "type": "object",
                "properties": {"answer": {"const": "yes"}, "why": {"type": "string", "maxLength": 9}},
                "required": ["answer"],
            },
            {"type": "object", "properties": {"answer": {"const": "nein, «ça»"}}, "required": ["answer"]},
        ]
    },
    "table": {
        "type": "array",
        "items": {
            "type": "array",
            "prefixItems": [{"type": "string", "maxLength": 3}, {"type": "boolean"}],
            "items": False,
            "minItems": 2,
        },
        "maxItems": 2,
    },
    "scores": {"type": "object", "additionalProperties": {"type": "integer", "minimum": -5, "maximum": 5}},
    "either": {
        "oneOf": [
            {"type": "string", "format": "date"},
            {"type": "null"},
            {"type": "array", "items": {"type": "integer"}, "maxItems": 2},
        ]
    },
}
