"""Structured initialisation: the look-up circuit that training would otherwise have to find by chance.

Answering "what is the code of K" needs two steps. First every digit, and every blank of an answer, gathers the key
words standing shortly before it and learns which digit of its group it is. Then a blank looks for the digit whose key
words and rank agree with its own, and copies it. A randomly initialised network sits on a long plateau until both
steps exist together; here layer 0 and layer 1 start with a rough version of them, on top of small random weights.
Training then has to refine it, and learns everything else (several keys, two hops, prose, ends of answers) from data.
"""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.tiny_model import words
from benchmarks.tiny_model.batches import MASK
from benchmarks.tiny_model.corpus import ORDINALS
from benchmarks.tiny_model.network import Network

# coordinates of the residual stream
CODE = slice(0, 64)  # which token this is
COMMON, DIGIT, BLANK, KEY, START, NAME = 64, 65, 66, 67, 68, 69
BAG = slice(72, 136)  # the key words before this position
RANK = 136  # three coordinates: the answer starts one, two, three positions before
OUT = slice(140, 204)  # token to be said

FAST, BROAD, SLOW = range(4), range(3, 7), range(16, 32)  # rotary pairs by wavelength


def token_classes(tokenizer) -> dict[str, list[int]]:
    """Ids of digits, of key words, and of the tokens an answer follows."""

    def one(text: str) -> int:
        return tokenizer.encode(text, add_special_tokens=False).ids[0]

    return {
        "digit": [one(str(d)) for d in range(10)],
        "key": [one(" " + w) for w in words.ADJECTIVES + words.NOUNS + list(ORDINALS)],
        "name": [one(" " + w) for w in words.NAMES],
        "start": [one(" "), one("\n")],
    }


@torch.no_grad()
def install(net: Network, tokenizer) -> None:
    """Write the circuit into a freshly initialised network."""
    shape, body = net.shape, net.model
    d, half = shape.head_dim, shape.head_dim // 2
    kinds = token_classes(tokenizer)
    speed = shape.rope_theta ** (-torch.arange(half, dtype=torch.float32) / half)

    table = body.embed_tokens.weight
    table.normal_(std=0.05)
    codes = torch.randn(shape.vocab_size, 64)
    codes[kinds["digit"]] = torch.linalg.qr(torch.randn(64, 64))[0][:10] * 8
    codes = codes / codes.norm(dim=1, keepdim=True) * 8
    codes[MASK] = 0  # a blank is nobody's key and is never said
    table[:, CODE] = codes
    table[:, COMMON] = 4
    table[kinds["digit"], DIGIT] = 4
    table[MASK, BLANK] = 4
    table[kinds["key"], KEY] = 4
    table[kinds["name"], NAME] = 4
    table[kinds["start"], START] = 4

    first = body.layers[0].self_attn
    q, k, v, o = (p.weight for p in (first.q_proj, first.k_proj, first.v_proj, first.o_proj))
    first.q_norm.weight.fill_(2.5)
    first.k_norm.weight.fill_(2.5)

    def turned(pairs: range, distance: float, size: float) -> Tensor:
        """A query part that scores highest `distance` positions back against keys with flat parts in `pairs`."""
        out = torch.zeros(d)
        for j in pairs:
            out[j] = size * torch.cos(-distance * speed[j])
            out[j + half] = size * torch.sin(-distance * speed[j])
        return out

    for group in range(2):
        rows = slice(group * d, (group + 1) * d)
        k[rows, COMMON] += turned(range(4), 0, 0.5)
        if group:
            k[rows, COMMON] += turned(range(4, 7), 0, 0.5)
            for j in SLOW[:8]:
                k[group * d + j, KEY] += 0.42
                k[group * d + j, NAME] += 0.42
            for j in SLOW[8:]:
                k[group * d + j, NAME] += 0.42
    for head, distance in enumerate((1, 2, 3)):
        q[head * d : (head + 1) * d, COMMON] += turned(FAST, distance, 0.5)
        v[(head // 2) * d, START] = 0.5
        o[RANK + head, head * d] += 1.2
    rows = slice(3 * d, 4 * d)
    q[rows, DIGIT] += turned(BROAD, 4.5, 0.5)
    q[rows, BLANK] += turned(BROAD, 9.0, 0.5)
    q[rows, KEY] += turned(BROAD, 3.5, 0.5)
    # digits and blanks gather key words and names; a key word gathers the name of the vault it lies in
    for j in SLOW[:8]:
        q[3 * d + j, COMMON] += 0.42
        q[3 * d + j, KEY] -= 0.42
    for j in SLOW[8:]:
        q[3 * d + j, KEY] += 0.6
    # values of group 1: dimension 0 carries the start mark, the others the token's code
    mix = torch.linalg.qr(torch.randn(64, 64))[0][:63]
    v[d + 1 : 2 * d, CODE] += 0.5 * mix
    o[BAG, 3 * d + 1 : 4 * d] += mix.T * 1.2

    # layer 1: half of the heads look up digits by key words, the others look up key words by a name and add them to
    # the bag; layer 2 looks up digits once more, now also by key words found that way
    slow = torch.tensor(list(SLOW) + [j + half for j in SLOW])
    repeat = shape.num_attention_heads // shape.num_key_value_heads
    for depth in (1, 2):
        attn = body.layers[depth].self_attn
        q, k, v, o = (p.weight for p in (attn.q_proj, attn.k_proj, attn.v_proj, attn.o_proj))
        attn.q_norm.weight.fill_(2.6)
        attn.k_norm.weight.fill_(2.6)
        for group in range(2):
            hop = depth == 1 and group == 1
            read = torch.zeros(d, shape.hidden_size)
            read[slow[4:], BAG] = 0.5 * torch.linalg.qr(torch.randn(64, 64))[0][:28]
            if not hop:
                read[slow[1:4], RANK : RANK + 3] = 0.5 * torch.eye(3)
            key_side, query_side = read.clone(), read.clone()
            key_side[slow[0], KEY if hop else DIGIT] = 0.6
            query_side[slow[0], BLANK] = 0.6
            k[group * d : (group + 1) * d] += key_side
            for head in range(group * repeat, (group + 1) * repeat):
                q[head * d : (head + 1) * d] += query_side
                o[BAG if hop else OUT, head * d : (head + 1) * d] += (0.8 if hop else 0.5) * torch.eye(64)
            v[group * d : (group + 1) * d, CODE] += 0.5 * torch.eye(64)

    net.lm_head.weight[:, OUT] += 0.15 * codes
