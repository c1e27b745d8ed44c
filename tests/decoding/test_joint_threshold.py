"""The rule that edits: fills, edits and ends against its definition in plain Python, for random blocks in one call."""

from __future__ import annotations

import random
from typing import NamedTuple

import torch

from losa_runtime.decoding.algorithm import Candidates, accept
from losa_runtime.decoding.registry import load_algorithm

MASK, B = 99, 6


class Block(NamedTuple):
    """rows: (offset, token now, sampled token, confidence)."""

    rows: list[tuple[int, int, int, float]]
    threshold: float
    edit_threshold: float
    post_edit_steps: int
    post_steps: int


def by_definition(block: Block) -> tuple[set[int], bool]:
    masks = [row for row in block.rows if row[1] == MASK]
    fills = {offset for offset, _, _, sure in masks if sure > block.threshold}
    if masks and not fills:
        fills = {min(masks, key=lambda row: (-row[3], row[0]))[0]}
    edits = {o for o, now, new, sure in block.rows if now not in (MASK, new) and sure > block.edit_threshold}
    if len(fills) < len(masks):
        return fills | edits, False
    if masks:
        return fills | edits, block.post_edit_steps == 0
    return edits, not edits or block.post_steps + 1 >= block.post_edit_steps


def random_block(chance: random.Random) -> Block:
    levels, rows = [0.0, 0.25, 0.5, 0.75, 1.0], []
    share = chance.choice([0.0, 0.3, 1.0])
    for offset in range(chance.randint(0, B - 1), B):
        now = MASK if chance.random() < share else chance.randint(0, 2)
        rows.append((offset, now, chance.randint(0, 2), chance.choice(levels)))
    most = chance.randint(0, 3)
    return Block(rows, chance.choice(levels), chance.choice(levels), most, chance.randint(0, max(0, most - 1)))


def test_thousands_of_blocks_equal_the_definition() -> None:
    chance = random.Random(5)
    blocks = [random_block(chance) for _ in range(3000)]
    rows = [row for block in blocks for row in block.rows]
    offset_R, current_R, token_R, confidence_R = (torch.tensor(column) for column in zip(*rows, strict=True))
    sizes = torch.tensor([0, *(len(block.rows) for block in blocks)])
    zeros = torch.zeros(len(blocks), dtype=torch.int64)
    candidates = Candidates(
        token_R=token_R,
        confidence_R=confidence_R.float(),
        offset_R=offset_R,
        indptr_S=sizes.cumsum(0),
        step_index_S=zeros,
        num_steps_S=zeros + B,
        length_S=zeros + B,
        threshold_S=torch.tensor([block.threshold for block in blocks], dtype=torch.float64),
        entropy_bound_S=zeros.double(),
        current_R=current_R,
        masked_R=current_R == MASK,
        edit_threshold_S=torch.tensor([block.edit_threshold for block in blocks], dtype=torch.float64),
        post_edit_steps_S=torch.tensor([block.post_edit_steps for block in blocks]),
        post_steps_S=torch.tensor([block.post_steps for block in blocks]),
        block_length=B,
    )
    accepted_R, finished_S = accept([load_algorithm("joint_threshold")] * len(blocks), candidates)
    ends = candidates.indptr_S.tolist()
    ended = {True: 0, False: 0}
    for s, block in enumerate(blocks):
        mine = slice(ends[s], ends[s + 1])
        got = set(offset_R[mine][accepted_R[mine]].tolist()), bool(finished_S[s])
        assert got == by_definition(block), block
        ended[got[1]] += 1
    assert min(ended.values()) > 300
