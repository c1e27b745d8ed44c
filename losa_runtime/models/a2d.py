"""A2D on Qwen3: the layers and names of Qwen3's own checkpoints, with the weights taught to fill blocks.

Logits belong to their own position. Blocks are anchored at position 0, see `losa_runtime.core.families.a2d`.
"""

from __future__ import annotations

from losa_runtime.models.decoder import DecoderModel


class A2DQwen3LMHeadModel(DecoderModel):
    """The model; parameter names are those of the released checkpoints."""
