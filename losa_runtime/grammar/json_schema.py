"""JSON Schema to one regular expression for the texts that are valid under it, or a refusal that names the keyword.

Every text that matches is valid; not every valid text matches. Left out are free spaces (one may follow a comma or a
colon), other orders of an object's properties, properties that are not listed, and escapes by number. Where a schema
allows any JSON, it may nest ANY_DEPTH deep, as a regular language cannot count brackets; recursion is refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from losa_runtime.grammar.json_numbers import INTEGER, NUMBER, integer_range
from losa_runtime.grammar.string_patterns import CHARACTER, UnsupportedPattern, inside_string

ANY_DEPTH = 2
MAX_DEPTH = 24
MAX_SIZE = 48 * 2**10  # characters of the regular expression
PART_SIZE = 64  # what a part of a schema counts beside the characters of its own
MAX_WORK = MAX_SIZE * MAX_DEPTH  # all parts together; each character is written again by the parts around it

COMMA, COLON = ", ?", ": ?"
STRING = f'"{CHARACTER}*"'
SCALAR = f"(?:{STRING}|{NUMBER}|true|false|null)"
ANNOTATIONS = frozenset(
    [
        "$schema",
        "$id",
        "$comment",
        "$defs",
        "definitions",
        "title",
        "description",
        "default",
        "examples",
        "deprecated",
        "readOnly",
        "writeOnly",
    ]
)
_LONG, _SHORT = "(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])", "(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)"
_DAY = f"[0-9]{{4}}-(?:{_LONG}|{_SHORT}|02-(?:0[1-9]|1[0-9]|2[0-8]))"  # without leap days
_CLOCK = r"(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\.[0-9]{1,6})?(?:Z|[+-](?:[01][0-9]|2[0-3]):[0-5][0-9])"
_BYTE = r"(?:25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])"
FORMATS = {
    "date": _DAY,
    "time": _CLOCK,
    "date-time": f"{_DAY}T{_CLOCK}",
    "uuid": r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}",
    "ipv4": rf"{_BYTE}(?:\.{_BYTE}){{3}}",
    "email": r"[a-z0-9](?:[a-z0-9._-]{0,30}[a-z0-9])?@(?:[a-z0-9](?:[a-z0-9-]{0,20}[a-z0-9])?\.){1,3}[a-z]{2,8}",
}


class UnsupportedSchema(ValueError):
    """where: the place in the schema, as a JSON pointer. found, allowed: as in an error for the user."""

    def __init__(self, where: str, found: object, allowed: str) -> None:
        self.where, self.found, self.allowed = where, found, allowed
        super().__init__(f"{where or 'the schema'}: found {found!r}, allowed: {allowed}")


def schema_pattern(schema: object) -> str:
    """The regular expression (Rust's syntax) of a schema. Raises UnsupportedSchema."""
    pattern = _Writer(schema).value(schema, "", ())
    if len(pattern) > MAX_SIZE:
        raise UnsupportedSchema("", f"a schema that expands to {len(pattern)} characters", f"at most {MAX_SIZE}")
    return pattern


def any_object() -> str:
    """Any JSON object, nested up to ANY_DEPTH deep."""
    return _any_container(ANY_DEPTH)[0]


def literal(text: str) -> str:
    """A regular expression for exactly this text."""
    return re.sub(r"([\\.+*?()|\[\]{}^$#&~-])", r"\\\1", text)


class _Writer:
    """One schema. `refs`: the references that are being followed."""

    def __init__(self, root: object) -> None:
        self._root = root
        self._work = 0
        self._by_type: dict[str, Callable[[Mapping[str, Any], str, tuple[str, ...]], str]] = {
            "string": self._string,
            "integer": self._integer,
            "number": self._number,
            "boolean": lambda schema, where, refs: self._plain(schema, where, "(?:true|false)"),
            "null": lambda schema, where, refs: self._plain(schema, where, "null"),
            "array": self._array,
            "object": self._object,
        }

    def value(self, schema: object, where: str, refs: tuple[str, ...]) -> str:
        """The texts that are valid under a schema."""
        pattern = self._value(schema, where, refs)
        # References may be followed again and again: a small schema must not keep us busy for hours.
        self._work += len(pattern) + PART_SIZE
        if self._work > MAX_WORK:
            raise UnsupportedSchema(where, "a schema that expands too far", f"at most {MAX_SIZE} characters of pattern")
        return pattern

    def _value(self, schema: object, where: str, refs: tuple[str, ...]) -> str:
        if where.count("/") > 2 * MAX_DEPTH:
            raise UnsupportedSchema(where, "a deeper schema", f"at most {MAX_DEPTH} levels")
        if schema is True or schema == {}:
            return _any_value(ANY_DEPTH)
        if not isinstance(schema, Mapping):
            raise UnsupportedSchema(where, schema, "an object (false allows nothing)")
        asserted = {key for key in schema if key not in ANNOTATIONS}
        if not asserted:
            return _any_value(ANY_DEPTH)
        for key in ("$ref", "const", "enum", "anyOf", "oneOf", "allOf"):
            if key in schema:
                self._only(schema, where, {key, "type"} if key in ("const", "enum") else {key})
                return self._combined(key, schema, where, refs)
        kinds = schema.get("type")
        if kinds is None:
            kinds = _implied(asserted)
            if kinds is None:
                raise UnsupportedSchema(where, sorted(asserted), "a schema with a `type`, or of keywords of one type")
        found = [kinds] if isinstance(kinds, str) else kinds
        if not isinstance(found, list) or not found or not all(kind in self._by_type for kind in found):
            raise UnsupportedSchema(f"{where}/type", kinds, f"one or several of {', '.join(self._by_type)}")
        if len(found) > 1:
            parts = [{"type": kind} | _about(schema, kind) for kind in found]
            unknown = asserted - {"type"} - {key for part in parts for key in part}
            self._only(schema, where, asserted - unknown)
            return _either([self.value(part, where, refs) for part in parts])
        return self._by_type[found[0]](schema, where, refs)

    def _combined(self, key: str, schema: Mapping[str, Any], where: str, refs: tuple[str, ...]) -> str:
        given = schema[key]
        if key == "$ref":
            if given in refs:
                raise UnsupportedSchema(f"{where}/$ref", given, "no recursion: nesting without end is not regular")
            return self.value(self._resolve(given, where), where, (*refs, given))
        if key in ("const", "enum"):
            values = [given] if key == "const" else given
            if not isinstance(values, list) or not values:
                raise UnsupportedSchema(f"{where}/{key}", given, "a list with something in it")
            if "type" in schema:
                values = [each for each in values if _has_type(each, schema["type"])]
            if not values:
                raise UnsupportedSchema(f"{where}/{key}", given, f"a value of type {schema['type']}")
            return _either([_constant(each) for each in values])
        if not isinstance(given, list) or not given:
            raise UnsupportedSchema(f"{where}/{key}", given, "a list of schemas with something in it")
        if key == "allOf" and len(given) > 1:
            raise UnsupportedSchema(f"{where}/allOf", f"{len(given)} schemas", "one (write their conjunction)")
        if key == "oneOf" and not self._disjoint(given, where):
            raise UnsupportedSchema(
                f"{where}/oneOf", "schemas that may overlap", "schemas of different types, or anyOf"
            )
        return _either([self.value(each, f"{where}/{key}/{i}", refs) for i, each in enumerate(given)])

    def _disjoint(self, schemas: Sequence[object], where: str) -> bool:
        """Whether no text can be valid under two of them, as far as their types and constants tell."""
        kinds: list[str] = []
        for schema in schemas:
            while isinstance(schema, Mapping) and set(schema) - ANNOTATIONS == {"$ref"}:
                schema = self._resolve(schema["$ref"], where)
            kind = schema.get("type") if isinstance(schema, Mapping) else None
            if isinstance(schema, Mapping) and "const" in schema:
                kind = f"={json.dumps(schema['const'])}"
            if not isinstance(kind, str):
                return False
            kinds.append("number" if kind == "integer" else kind)
        constants = [kind for kind in kinds if kind.startswith("=")]
        return len(set(kinds)) == len(kinds) and (not constants or len(constants) == len(kinds))

    def _resolve(self, reference: object, where: str) -> object:
        if not isinstance(reference, str) or not reference.startswith("#"):
            raise UnsupportedSchema(f"{where}/$ref", reference, "a reference into this schema (#/$defs/…)")
        found = self._root
        for part in reference[1:].split("/")[1:]:
            name = part.replace("~1", "/").replace("~0", "~")
            if not isinstance(found, Mapping) or name not in found:
                raise UnsupportedSchema(f"{where}/$ref", reference, "something that is there")
            found = found[name]
        return found

    def _string(self, schema: Mapping[str, Any], where: str, refs: tuple[str, ...]) -> str:
        self._only(schema, where, {"type", "minLength", "maxLength", "pattern", "format"})
        special = [key for key in ("pattern", "format") if key in schema]
        sized = [key for key in ("minLength", "maxLength") if key in schema]
        if len(special) == 2 or (special and sized):
            raise UnsupportedSchema(where, [*special, *sized], "a pattern, a format or lengths")
        if "format" in schema:
            if schema["format"] not in FORMATS:
                raise UnsupportedSchema(f"{where}/format", schema["format"], f"one of {', '.join(FORMATS)}")
            return f'"{FORMATS[schema["format"]]}"'
        if "pattern" in schema:
            try:
                return f'"{inside_string(schema["pattern"])}"'
            except (UnsupportedPattern, AttributeError) as error:
                found, allowed = schema["pattern"], str(error)
                raise UnsupportedSchema(f"{where}/pattern", found, allowed) from None
        return f'"{CHARACTER}{_times(*self._bounds(schema, where, "minLength", "maxLength"))}"'

    def _integer(self, schema: Mapping[str, Any], where: str, refs: tuple[str, ...]) -> str:
        self._only(schema, where, {"type", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"})
        bounds: list[int | None] = []
        for inclusive, exclusive, inward in (("minimum", "exclusiveMinimum", 1), ("maximum", "exclusiveMaximum", -1)):
            found = []
            for key, shift in ((inclusive, 0), (exclusive, inward)):
                if key in schema:
                    found.append(_whole(schema[key], f"{where}/{key}") + shift)
            bounds.append((max(found) if inward > 0 else min(found)) if found else None)
        low, high = bounds
        if low is None and high is None:
            return INTEGER
        if low is not None and high is not None and low > high:
            raise UnsupportedSchema(where, [low, high], "bounds with an integer between them")
        return integer_range(low, high)

    def _number(self, schema: Mapping[str, Any], where: str, refs: tuple[str, ...]) -> str:
        self._only(schema, where, {"type", "minimum"})
        if schema.get("minimum", 0) != 0 or isinstance(schema.get("minimum"), bool):
            raise UnsupportedSchema(f"{where}/minimum", schema["minimum"], "0 (only integers have other bounds)")
        return NUMBER.removeprefix("-?") if "minimum" in schema else NUMBER

    def _plain(self, schema: Mapping[str, Any], where: str, pattern: str) -> str:
        self._only(schema, where, {"type"})
        return pattern

    def _array(self, schema: Mapping[str, Any], where: str, refs: tuple[str, ...]) -> str:
        self._only(schema, where, {"type", "items", "prefixItems", "minItems", "maxItems"})
        first = schema.get("prefixItems", [])
        if not isinstance(first, list):
            raise UnsupportedSchema(f"{where}/prefixItems", first, "a list of schemas")
        least, most = self._bounds(schema, where, "minItems", "maxItems")
        heads = [self.value(each, f"{where}/prefixItems/{i}", refs) for i, each in enumerate(first)]
        rest = schema.get("items", True)
        if rest is False:
            most = len(heads) if most is None else min(most, len(heads))
        item = "" if rest is False else self.value(rest, f"{where}/items", refs)
        if most is not None and least > most:
            raise UnsupportedSchema(f"{where}/minItems", least, f"at most {most} items")
        return rf"\[{_sequence(heads, item, least, most)}\]"

    def _object(self, schema: Mapping[str, Any], where: str, refs: tuple[str, ...]) -> str:
        self._only(schema, where, {"type", "properties", "required", "additionalProperties"})
        properties, required = schema.get("properties", {}), schema.get("required", [])
        if not isinstance(properties, Mapping) or not isinstance(required, list):
            raise UnsupportedSchema(where, "properties or required", "an object of schemas, a list of names")
        missing = [name for name in required if name not in properties]
        if missing:
            raise UnsupportedSchema(f"{where}/required", missing, "names that `properties` describes")
        more = schema.get("additionalProperties", True)
        if not properties:
            if more is False:
                return r"\{\}"
            value = (
                _any_value(ANY_DEPTH - 1) if more is True else self.value(more, f"{where}/additionalProperties", refs)
            )
            pair = f"{STRING}{COLON}{value}"
            return rf"\{{(?:{pair}(?:{COMMA}{pair})*)?\}}"
        pairs = []
        for name, each in properties.items():
            value = self.value(each, f"{where}/properties/{name}", refs)
            pairs.append((f"{_constant(name)}{COLON}{value}", name in required))
        return rf"\{{{_members(pairs)}\}}"

    def _bounds(self, schema: Mapping[str, Any], where: str, low: str, high: str) -> tuple[int, int | None]:
        least = _whole(schema.get(low, 0), f"{where}/{low}")
        most = None if high not in schema else _whole(schema[high], f"{where}/{high}")
        if least < 0 or (most is not None and most < least):
            raise UnsupportedSchema(f"{where}/{high}", most, f"at least {low} = {least}, which is at least 0")
        return least, most

    def _only(self, schema: Mapping[str, Any], where: str, known: set[str]) -> None:
        for key in schema:
            if key not in known and key not in ANNOTATIONS:
                beside = ", ".join(sorted(known & set(schema)))
                raise UnsupportedSchema(f"{where}/{key}", schema[key], f"no such keyword beside {beside}")


_OF_TYPE = {
    "string": {"minLength", "maxLength", "pattern", "format"},
    "integer": {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"},
    "number": {"minimum"},
    "array": {"items", "prefixItems", "minItems", "maxItems"},
    "object": {"properties", "required", "additionalProperties"},
}


def _implied(keys: set[str]) -> str | None:
    """The type whose keywords these are, for schemas that do not say."""
    kinds = [kind for kind in ("string", "array", "object") if keys <= _OF_TYPE[kind]]
    return kinds[0] if kinds else None


def _about(schema: Mapping[str, Any], kind: str) -> dict[str, Any]:
    return {key: schema[key] for key in _OF_TYPE.get(kind, set()) if key in schema}


def _has_type(value: object, kinds: object) -> bool:
    found = {str: "string", bool: "boolean", int: "integer", float: "number", list: "array", dict: "object"}
    kind = "null" if value is None else found.get(type(value), "")
    wanted = kinds if isinstance(kinds, list) else [kinds]
    return kind in wanted or (kind == "integer" and "number" in wanted)


def _whole(value: object, where: str) -> int:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or abs(value) >= 10**18:
        raise UnsupportedSchema(where, value, "an integer of at most 18 digits")
    return value


def _constant(value: object) -> str:
    """A constant as it is written: without spaces but those of COMMA and COLON."""
    if isinstance(value, Mapping):
        inside = COMMA.join(f"{_constant(key)}{COLON}{_constant(each)}" for key, each in value.items())
        return rf"\{{{inside}\}}"
    if isinstance(value, list):
        return rf"\[{COMMA.join(map(_constant, value))}\]"
    return literal(json.dumps(value, ensure_ascii=False))


def _either(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"(?:{'|'.join(parts)})"


def _times(least: int, most: int | None) -> str:
    if most is None:
        return {0: "*", 1: "+"}.get(least, f"{{{least},}}")
    return f"{{{least},{most}}}"


def _sequence(heads: Sequence[str], item: str, least: int, most: int | None) -> str:
    """`heads`, then any number of items; of all of them at least `least` and at most `most`, commas between."""
    if most is not None:
        heads = heads[:most]
    tail = ""
    if item and (most is None or most > len(heads)):
        room = None if most is None else most - len(heads)
        needed = max(0, least - len(heads))
        if heads:
            tail = f"(?:{COMMA}{item}){_times(needed, room)}"
        else:
            again = f"(?:{COMMA}{item}){_times(max(0, needed - 1), None if room is None else room - 1)}"
            tail = f"{item}{again}" if needed else f"(?:{item}{again})?"
    for number in reversed(range(len(heads))):
        here = (COMMA if number else "") + heads[number] + tail
        tail = here if number < least else f"(?:{here})?"
    return tail


def _members(pairs: Sequence[tuple[str, bool]]) -> str:
    """Properties in their order, optional ones left out or not, commas between."""
    needed = [i for i, (_, required) in enumerate(pairs) if required]
    if needed:
        before = "".join(f"(?:{pair}{COMMA})?" for pair, _ in pairs[: needed[0]])
        return before + pairs[needed[0]][0] + _following(pairs[needed[0] + 1 :])
    starts = [pair + _following(pairs[i + 1 :]) for i, (pair, _) in enumerate(pairs)]
    return f"(?:{'|'.join(starts)})?"


def _following(pairs: Sequence[tuple[str, bool]]) -> str:
    return "".join(f"{COMMA}{pair}" if required else f"(?:{COMMA}{pair})?" for pair, required in pairs)


def _any_value(depth: int) -> str:
    return SCALAR if depth <= 0 else _either([SCALAR, *_any_container(depth)])


def _any_container(depth: int) -> tuple[str, str]:
    inner = _any_value(depth - 1)
    pair = f"{STRING}{COLON}{inner}"
    return rf"\{{(?:{pair}(?:{COMMA}{pair})*)?\}}", rf"\[(?:{inner}(?:{COMMA}{inner})*)?\]"
