"""Reading single fields of a JSON body: of the right type, or refused by name. Null always means the default.

Knows no particular route. `count` prompts of one call may have a value each, in a list, or share one.
"""

from __future__ import annotations

from typing import Any

from losa_runtime.core.errors import InvalidRequest
from losa_runtime.core.sampling_params import MAX_COUNT

MAX_NAME = 256  # characters of a label, an extra_key, a cache_salt
_WORDS = {bool: "true or false", int: "an integer", str: "a string"}


def flag(body: dict[str, Any], name: str, default: bool = False) -> bool:
    """A boolean."""
    value = body.get(name)
    if value is None:
        return default
    if type(value) is not bool:
        raise InvalidRequest(name, value, "true or false")
    return value


def integer(body: dict[str, Any], name: str, default: int, least: int, most: int) -> int:
    """An integer from `least` to `most`."""
    value = body.get(name)
    if value is None:
        return default
    if type(value) is not int or not least <= value <= most:
        raise InvalidRequest(name, value, f"an integer from {least} to {most}")
    return value


def mapping(body: dict[str, Any], name: str) -> dict[str, Any]:
    """An object; empty by default."""
    value = body.get(name)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise InvalidRequest(name, value, "an object")
    return value


def per_prompt(body: dict[str, Any], name: str, count: int, kind: type, default: Any) -> list[Any]:
    """`count` values of one type."""
    value = body.get(name)
    values = value if isinstance(value, list) else [value] * count
    values = [default if v is None else v for v in values]
    if len(values) == 1:
        values = values * count
    if len(values) != count or not all(type(v) is kind for v in values):
        raise InvalidRequest(name, value, f"{_WORDS[kind]}, or one for each of {count} prompts")
    return values


def labels(body: dict[str, Any], count: int) -> list[str | None]:
    """`rid`: the client's names for its requests; one name for several prompts gets their numbers behind it."""
    rid = body.get("rid")
    values = rid if isinstance(rid, list) else [rid] * count
    if len(values) != count or not all(v is None or (isinstance(v, str) and len(v) <= MAX_NAME) for v in values):
        allowed = f"a string, or one for each of {count} prompts, of at most {MAX_NAME} characters"
        raise InvalidRequest("rid", rid, allowed)
    return [f"{rid}_{i}" for i in range(count)] if isinstance(rid, str) and count > 1 else values


def priorities(body: dict[str, Any], count: int) -> list[int]:
    """`priority`: who is served first, where the server goes by it."""
    values = per_prompt(body, "priority", count, int, 0)
    for value in values:
        if abs(value) > MAX_COUNT:
            raise InvalidRequest("priority", value, f"{-MAX_COUNT} to {MAX_COUNT}")
    return values


def namespaces(body: dict[str, Any], count: int) -> list[str]:
    """`extra_key` and `cache_salt` both separate prefix caches; requests share one only if both agree."""
    keys = per_prompt(body, "extra_key", count, str, "")
    salts = per_prompt(body, "cache_salt", count, str, "")
    for name, values in (("extra_key", keys), ("cache_salt", salts)):
        if any(len(value) > MAX_NAME for value in values):
            raise InvalidRequest(name, body[name], f"at most {MAX_NAME} characters")
    return [f"{len(key)}:{key}{salt}" if key or salt else "" for key, salt in zip(keys, salts, strict=True)]


def refuse(body: dict[str, Any], refused: dict[str, str]) -> None:
    """Raise for the first field that asks for what cannot be had; null, false, 0 and empty ones ask for nothing."""
    for name, allowed in refused.items():
        if not asks_for_nothing(body.get(name)):
            raise InvalidRequest(name, body[name], allowed)


def asks_for_nothing(value: Any) -> bool:
    """True for null, false, 0, what is empty, and lists of these."""
    if isinstance(value, list | tuple):
        return all(asks_for_nothing(item) for item in value)
    return value is None or value is False or value in (0, "", {})
