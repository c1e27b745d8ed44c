"""From JSON to SamplingParams: drops unknown names, and takes this runtime's own knobs from where clients leave them.

Shared by the native and the OpenAI routes. Knows no prompt and no answer.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from losa_runtime.core.errors import InvalidRequest
from losa_runtime.core.sampling_params import REFUSED as REFUSED_PARAMS
from losa_runtime.core.sampling_params import DiffusionParams, SamplingParams

KNOWN = frozenset(SamplingParams.model_fields) | frozenset(REFUSED_PARAMS)
KNOBS = frozenset(DiffusionParams.model_fields)


class Wishes(NamedTuple):
    """How to generate. trace: report every denoising step."""

    sampling: SamplingParams
    trace: bool = False


def parse_wishes(given: Any, shared: dict[str, Any], where: str = "sampling_params") -> Wishes:
    """Validate one `sampling_params` object. shared: `custom_params` from beside it, where some routers leave them; the
    inner ones win. Raises InvalidRequest naming the field under `where`."""
    if given is None:
        given = {}
    if not isinstance(given, dict):
        raise InvalidRequest(where, given, "an object")
    known = {name: value for name, value in given.items() if name in KNOWN}
    inner = known.get("custom_params")
    if inner is not None and not isinstance(inner, dict):
        raise InvalidRequest(f"{where}.custom_params", inner, "an object")
    custom = {**shared, **(inner or {})}
    trace = custom.pop("trace", None)
    if trace is not None and type(trace) is not bool:
        raise InvalidRequest(f"{where}.custom_params.trace", trace, "true or false")
    known["custom_params"] = custom
    return Wishes(SamplingParams.parse(known, where), bool(trace))
