"""Fast-dLLM v2: a Qwen2.5 decoder trained to fill blocks; logits are shifted, position i is predicted at i - 1.

Biases on q, k and v; no norms per head. The first token of a block comes from the last row of the block before it.
"""

from __future__ import annotations

from typing import ClassVar

from losa_runtime.models.decoder import DecoderModel


class FastDLLMForCausalLM(DecoderModel):
    """The model; parameter names are those of the released checkpoints."""

    shifted_logits: ClassVar[bool] = True
    biases: ClassVar[bool] = True
    head_norms: ClassVar[bool] = False
