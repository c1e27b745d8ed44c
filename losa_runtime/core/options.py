"""How a setting is declared: one line with its default, its group, what it means, and the limits of its values.

Whoever shows settings to people (flags, environment variables, files) reads the declaration back from the model's
fields. Knows no command line.
"""

from __future__ import annotations

from typing import Any

from pydantic import Field


def option(
    default: Any, group: str, text: str, *, names: tuple[str, ...] = (), metavar: str | None = None, **limits: Any
) -> Any:
    """A pydantic field that is also an option.

    default: `...` if there is none. group: heading under which it is shown. text: its meaning in one line.
    names: further names beside the field's own; the first is the one that is shown. limits: as of pydantic's Field.
    """
    return Field(
        default, description=text, json_schema_extra={"group": group, "names": [*names], "metavar": metavar}, **limits
    )
