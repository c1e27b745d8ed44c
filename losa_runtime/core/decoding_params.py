"""A request's settled decoding parameters."""

from __future__ import annotations

from typing import NamedTuple


class DecodingParams(NamedTuple):
    """algorithm: registry name. threshold: confidence above which the dynamic rule accepts. num_steps: planned
    denoising steps per block, 1 .. block length."""

    algorithm: str
    threshold: float
    num_steps: int
