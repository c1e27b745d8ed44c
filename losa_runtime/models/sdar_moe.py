"""SDAR with experts: Qwen3-MoE's layers. The router's softmax goes over all experts, in float32, before the choice.

Checkpoints have the router as `mlp.gate.weight` and each expert as `mlp.experts.{e}.{gate,up,down}_proj.weight`.
"""

from __future__ import annotations

from losa_runtime.models.decoder import DecoderModel


class SDARMoeForCausalLM(DecoderModel):
    """The model; parameter names are those of the released checkpoints."""
