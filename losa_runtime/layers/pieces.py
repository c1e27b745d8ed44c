"""Where the tensors of a checkpoint go in a module: as a rule each into the parameter of its own name.

A part that keeps several of them in one parameter has a method `pieces` that says so. Knows no file.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import nn


class Piece(NamedTuple):
    """A checkpoint tensor's place: the parameter's name, and which part of it (all of it if none is named).

    dtype: kept whatever the model is loaded in, None = the model's.
    """

    parameter: str
    part: tuple[int | slice, ...] = ()
    dtype: torch.dtype | None = None


class Place(NamedTuple):
    """A piece with the shape that it must have."""

    piece: Piece
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Numbers in the tensor."""
        return math.prod(self.shape)


def places(module: nn.Module) -> dict[str, Place]:
    """Checkpoint name -> place, of all parameters of a module, in its order."""
    found: dict[str, Place] = {}
    for prefix, part in module.named_modules():
        dot = f"{prefix}." if prefix else ""
        own = (
            part.pieces()
            if hasattr(part, "pieces")
            else ((name, Piece(name)) for name, _ in part.named_parameters(recurse=False))
        )
        for name, piece in own:
            shape = tuple(part.get_parameter(piece.parameter)[piece.part or ...].shape)
            found[dot + name] = Place(piece._replace(parameter=dot + piece.parameter), shape)
    return found
