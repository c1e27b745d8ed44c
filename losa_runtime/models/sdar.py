"""SDAR and TraDo: a Qwen3 dense decoder trained to fill blocks; logits belong to their own position.

No biases; RMSNorm per head on q and k before the rotation.
"""

from __future__ import annotations

from losa_runtime.models.decoder import DecoderModel


class SDARForCausalLM(DecoderModel):
    """The model; parameter names are those of the released checkpoints."""
