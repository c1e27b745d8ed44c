"""A request's settled decoding parameters."""

from __future__ import annotations

from typing import NamedTuple


class DecodingParams(NamedTuple):
    """algorithm: registry name. threshold: confidence above which the dynamic rule accepts. num_steps: planned
    denoising steps per block, 1 .. block length. entropy_bound: nats that the entropy-bounded rule accepts together.
    edit_threshold, post_edit_steps, neighbour_penalty: of the rule that edits."""

    algorithm: str
    threshold: float
    num_steps: int
    entropy_bound: float = 0.1
    edit_threshold: float = 0.9
    post_edit_steps: int = 16
    neighbour_penalty: float = 0.0
