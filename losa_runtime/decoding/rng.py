"""Random numbers without a history: a pure function of (seed, position, step).

A request that is retracted in mid-block and resumed, batched with others or run alone draws the same numbers, because
no generator is advanced. Knows neither logits nor requests. Shape letters: R rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

# The finaliser of splitmix64 (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators"), written
# on int64 because torch has no 64-bit unsigned arithmetic: products wrap, right shifts are made logical by a mask.
_MULTIPLIER_1 = 0xBF58476D1CE4E5B9 - 2**64
_MULTIPLIER_2 = 0x94D049BB133111EB - 2**64
# One additive constant per word, so that (seed, position, step) and its permutations have different hashes.
_WORD_CONSTANTS = (0x9E3779B97F4A7C15 - 2**64, 0x3C6EF372FE94F82A, 0xDAA66D2C7DDF743F - 2**64)

# Added (xor) to a seed for the order of positions, which must not be that of the tokens' draw: of pi's fraction.
ORDER_STREAM = 0x243F6A8885A308D3


def uniform(seed_R: Tensor, position_R: Tensor, step_R: Tensor) -> Tensor:
    """One number in [0, 1) per row, a multiple of 2**-53.

    seed_R, position_R, step_R: int64 [R] on one device; position is the token's absolute position in its request,
    step the denoising step in its block. Returns float64 [R].
    """
    hash_R = torch.zeros_like(seed_R)
    for word_R, constant in zip((seed_R, position_R, step_R), _WORD_CONSTANTS, strict=True):
        hash_R = _mix(hash_R ^ _mix(word_R + constant))
    return _shift_right(hash_R, 11).to(torch.float64) * 2.0**-53


def _mix(x_R: Tensor) -> Tensor:
    """A bijection of 64-bit words in which each input bit changes about half of the output bits."""
    x_R = (x_R ^ _shift_right(x_R, 30)) * _MULTIPLIER_1
    x_R = (x_R ^ _shift_right(x_R, 27)) * _MULTIPLIER_2
    return x_R ^ _shift_right(x_R, 31)


def _shift_right(x_R: Tensor, bits: int) -> Tensor:
    return (x_R >> bits) & ((1 << (64 - bits)) - 1)
