"""A2D-Qwen3: an autoregressive Qwen3 taught block diffusion; the mask is a token that was added to its tokenizer.

Blocks are counted from position 0 as everywhere here, not from the left of a prompt padded to whole blocks as in the
loop it was published with: padding moves every block of a prompt with its length, so that no two prompts of different
lengths could share a prefix. The grid "prompt-end" has blocks lie where that loop has them: what padding leaves of the
first block is a shorter one, and a block ends with the prompt.
"""

from __future__ import annotations

from losa_runtime.core.families.family import Family

FAMILY = Family(
    block_length=32,
    mask_token_id=None,
    only={"attention_bias": (False,), "partial_rotary_factor": (1, 1.0)},
    grids=("start", "prompt-end"),
)
