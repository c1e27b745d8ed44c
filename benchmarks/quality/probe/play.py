"""Plays a script: the same tokens appear in the same steps for every setting, and errors and probabilities are noted.

S settings, B block length, L layers, T steps of a block.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.quality.probe.watch import Seen, watching
from benchmarks.quality.scripts import Revealed, Script, per_step
from benchmarks.quality.stage import Stage
from losa_runtime.core.batch import SparseParams

Floats = NDArray[np.float64]


class Played(NamedTuple):
    """What came out of one script.

    logprobs: [S, scored tokens], each at the step that revealed it; right: whether it was the likeliest. prefix_error,
    output_error: [S, T, L], length of the error of the attention to the prefix alone, and to prefix and block together,
    relative to exact attention of the same queries. read, dense: bytes [S, T].
    """

    kind: str
    logprobs: Floats
    right: NDArray[np.bool_]
    prefix_error: Floats
    output_error: Floats
    read: Floats
    dense: Floats


def settle(script: Script, stage: Stage, dense: SparseParams, count: int) -> Revealed:
    """The script's own order, or that of the dense model's confidence: the `count` surest tokens of each step.

    Revealed are the true tokens, whatever the model would have written. The prefix must be stored.
    """
    if script.order is not None:
        return Revealed(script, script.order)
    order: list[tuple[int, ...]] = []
    left = list(range(script.known, stage.block))
    while left:
        sofar = Revealed(script, tuple(order))
        step = len(order)
        shown = stage.show([dense], sofar.tokens(step, stage.mask), step, sofar.unmasked(step))
        sure = shown.logprobs_SBV[0].amax(-1).tolist()
        best = sorted(left, key=lambda offset: (-sure[offset], offset))[:count]
        order.append(tuple(sorted(best)))
        left = [offset for offset in left if offset not in best]
    stage.end()
    return Revealed(script, tuple(order))


def play(revealed: Revealed, stage: Stage, settings: Sequence[SparseParams]) -> Played:
    """All settings through all steps. The prefix must be stored."""
    script, steps = revealed.script, len(revealed.order)
    errors = _Errors(len(settings), steps, stage.layers)
    logprobs: list[Floats] = []
    right: list[NDArray[np.bool_]] = []
    read, dense = np.zeros((2, len(settings), steps))
    for step, counting in enumerate(per_step(revealed.order, script.scored)):
        errors.step = step
        tokens = revealed.tokens(step, stage.mask)
        shown = stage.show(settings, tokens, step, revealed.unmasked(step), watching(errors.note))
        for offset in counting:
            token = script.tokens[offset]
            logprobs.append(shown.logprobs_SBV[:, offset, token].double().numpy())
            right.append((shown.logprobs_SBV[:, offset].argmax(-1) == token).numpy())
        read[:, step] = [report.kv_bytes + report.metadata_bytes for report in shown.reports]
        dense[:, step] = [report.dense_bytes for report in shown.reports]
    stage.end()
    return Played(script.kind, np.stack(logprobs, 1), np.stack(right, 1), errors.prefix, errors.output, read, dense)


def walk(revealed: Revealed, stage: Stage, dense: SparseParams, see: Callable[[int, Seen], None]) -> None:
    """The dense model through all steps; `see` gets the step and what went through each layer."""
    for step in range(len(revealed.order)):
        glass = watching(partial(see, step))
        stage.show([dense], revealed.tokens(step, stage.mask), step, revealed.unmasked(step), glass)
    stage.end()


class _Errors:
    """Relative errors as they are seen; slot = setting."""

    def __init__(self, settings: int, steps: int, layers: int) -> None:
        self.prefix, self.output = np.zeros((2, settings, steps, layers))
        self.step = 0

    def note(self, seen: Seen) -> None:
        exact = seen.exact()
        slots = [segment.slot for segment in seen.group.segments]
        apart = _apart(seen.prefix.out_RHD, exact.out_RHD, len(slots))
        self.prefix[slots, self.step, seen.layer] = apart
        apart = _apart(seen.merged(seen.prefix), seen.merged(exact), len(slots))
        self.output[slots, self.step, seen.layer] = apart


def _apart(found_RHD: Tensor, wanted_RHD: Tensor, segments: int) -> Floats:
    """Length of the difference of each segment relative to that of what was wanted."""
    found_SX, wanted_SX = (x.double().reshape(segments, -1) for x in (found_RHD, wanted_RHD))
    apart_S = torch.linalg.vector_norm(found_SX - wanted_SX, dim=1)
    length_S = torch.linalg.vector_norm(wanted_SX, dim=1)
    return (apart_S / length_S).numpy()
