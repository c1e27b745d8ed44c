"""Decoding as other engines have it by default, under their names: values for a request that sends `preset`.

Only rules that can be had here exactly, at temperature 0, are offered; each is written down with what differs. A block
always ends within its planned steps, one token per step unless `denoising_steps` says otherwise; those of LLaDA2.1,
which edit, have none and take as many as it needs. Defaults as read in the engines' public sources in autumn 2026.
Loads no tensor library.

sdar: SDAR's generation loop. All candidates whose confidence exceeds 0.85, else the planned number of the surest. There
  confidence is read after top_k and top_p, here before (with top_k = 1 theirs is always 1, and a block is one step).
lmdeploy: the same rule and threshold, one token where none is sure. Confidence is of the untempered logits there; at
  temperature 0 it is here as well.
sglang: its LowConfidence algorithm. Threshold 0.95, the surest one where none exceeds it, the likeliest token always:
  it is that rule at temperature 0, which this preset does not set.
llada2.1-speed: SGLang's JointThreshold with its defaults, LLaDA2.1's mode for speed: masks are filled above 0.5, tokens
  replaced whenever the model would now choose another one, 17 steps at most after the last mask (there it is 16 beyond
  the first). Its likeliest tokens are those of temperature 0, which this preset does not set.
llada2.1-quality: the same with LLaDA2.1's mode for quality: 0.95 and 0.9.
fast-dllm-v2: Fast-dLLM v2's generation loop. Sub-blocks of 8 from left to right; in the open one all candidates whose
  confidence exceeds 0.95, the surest one where none does. There it is always the likeliest token, with its unfiltered
  probability: that rule at temperature 0, which this preset does not set. Its cache of sub-blocks, an approximation
  that is off by default there, is not had here. A block length that 8 does not divide is refused.
"""

from __future__ import annotations

from typing import NamedTuple


class Preset(NamedTuple):
    """Decoding parameters that go together."""

    algorithm: str
    threshold: float
    edit_threshold: float | None = None
    post_edit_steps: int | None = None
    sub_block_length: int | None = None


PRESETS: dict[str, Preset] = {
    "sdar": Preset("low_confidence_dynamic", threshold=0.85),
    "lmdeploy": Preset("low_confidence_dynamic", threshold=0.85),
    "sglang": Preset("low_confidence_dynamic", threshold=0.95),
    "llada2.1-speed": Preset("joint_threshold", threshold=0.5, edit_threshold=0.0, post_edit_steps=17),
    "llada2.1-quality": Preset("joint_threshold", threshold=0.95, edit_threshold=0.9, post_edit_steps=17),
    "fast-dllm-v2": Preset("low_confidence_dynamic", threshold=0.95, sub_block_length=8),
}
