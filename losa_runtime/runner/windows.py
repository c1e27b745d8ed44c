"""Which rows of a block segment are looked at in a step, and which of them may become tokens: the open sub-block.

Without sub-blocks all candidates are both. Knows no logits and no algorithm.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from losa_runtime.core.work import Ids, WorkItem


def asked(item: WorkItem) -> Ids:
    """Offsets whose logits are wanted: the candidates in the open sub-block; of a block with a grammar, which looks at
    it as a whole, all."""
    assert item.candidates is not None, "a block segment without candidates"
    if item.window is None or (item.context is not None and item.context.guide is not None):
        return item.candidates
    return item.candidates[item.candidates < item.window.stop]


def unmaskable(item: WorkItem) -> NDArray[np.bool_]:
    """Which of these may become tokens now."""
    offsets = asked(item)
    return np.ones(offsets.size, dtype=bool) if item.window is None else offsets < item.window.stop


def plan(item: WorkItem, block_length: int) -> tuple[int, int, int]:
    """Steps taken, steps planned, and for how many positions: of the block, or of its open sub-block."""
    assert item.decoding is not None, "a denoising segment without decoding parameters"
    if item.window is None:
        return item.step, item.decoding.num_steps, block_length
    return item.window.step, item.window.num_steps, item.window.length
