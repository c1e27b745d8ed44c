"""Sub-blocks: how they are asked for, how they share a plan, and blocks played to their end against plain Python."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from losa_runtime.core.batch import ForwardMode
from losa_runtime.core.decoding_params import DecodingParams, Window
from losa_runtime.core.errors import ConfigError, InvalidRequest
from losa_runtime.core.sampling_params import DiffusionParams
from losa_runtime.core.work import WorkItem
from losa_runtime.decoding.registry import ALGORITHMS, load_algorithm, resolve
from losa_runtime.runner.windows import asked, plan, unmaskable
from losa_runtime.scheduler.block import DiffusionBlock, FirstToken
from tests.decoding import oracle
from tests.decoding.test_algorithms import BOUND, by_block, candidates_of, config, entropy_of, lot_of, margin_of

RULES = sorted(name for name in ALGORITHMS if not load_algorithm(name).edits)
LEVELS = (0.0, 0.125, 0.25, 0.5, 0.75, 0.875, 1.0)


def asking(**values: object) -> DiffusionParams:
    return DiffusionParams.model_validate(values)


def test_the_request_then_the_preset_then_the_engine() -> None:
    assert resolve(asking(), config(), 32).sub_block_length is None
    assert resolve(asking(), config(sub_block_length=16), 32).sub_block_length == 16
    assert resolve(asking(sub_block_length=4), config(sub_block_length=16), 32).sub_block_length == 4
    engine = config(algorithm="sequential", sub_block_length=16)
    fast = resolve(asking(preset="fast-dllm-v2"), engine, 32)
    assert fast == DecodingParams("low_confidence_dynamic", 0.95, 32, sub_block_length=8)
    assert resolve(asking(preset="fast-dllm-v2", sub_block_length=2), engine, 32).sub_block_length == 2
    assert resolve(asking(sub_block_length=32), engine, 32).sub_block_length is None, "one part is the whole block"


@pytest.mark.parametrize(
    ("wish", "block", "message"),
    [
        ({"sub_block_length": 5}, 32, "sub_block_length: found 5, allowed: a divisor of the block length of 32"),
        ({"sub_block_length": 64}, 32, "sub_block_length: found 64, allowed: a divisor of the block length of 32"),
        ({"preset": "fast-dllm-v2"}, 4, "sub_block_length: found 8, allowed: a divisor of the block length of 4"),
        (
            {"sub_block_length": 8, "denoising_steps": 3},
            32,
            "denoising_steps: found 3, allowed: 4 to 32: each sub-block of 8 takes a step",
        ),
        (
            {"sub_block_length": 8, "algorithm": "joint_threshold"},
            32,
            "sub_block_length: found 8, allowed: absent: 'joint_threshold' edits a block as a whole until it ends",
        ),
    ],
)
def test_refusals(wish: dict[str, object], block: int, message: str) -> None:
    with pytest.raises(InvalidRequest, match=f"custom_params.{message}"):
        resolve(asking(**wish), config(), block)
    if "preset" not in wish:
        with pytest.raises(ConfigError, match=message):
            resolve(asking(), config(**wish), block)


def test_what_is_no_length_is_refused() -> None:
    for value in (0, -8, 2.5, True):
        with pytest.raises(ValueError, match="sub_block_length"):
            asking(sub_block_length=value)
    with pytest.raises(ConfigError, match="sub_block_length"):
        config(sub_block_length=0)


def test_an_algorithm_without_sub_blocks_takes_no_length_that_was_meant_for_others() -> None:
    engine = config(sub_block_length=8)
    assert resolve(asking(algorithm="joint_threshold"), engine, 32).sub_block_length is None
    assert resolve(asking(preset="llada2.1-speed"), engine, 32).sub_block_length is None
    own = asking(preset="fast-dllm-v2", algorithm="joint_threshold")
    assert resolve(own, config(), 32).sub_block_length is None


def test_sub_blocks_share_the_planned_steps() -> None:
    settled = DecodingParams("sequential", 0.9, 10, sub_block_length=8)
    windows = [settled.window(number, 3, 32) for number in range(4)]
    assert windows == [Window(8, 8, 3, 3), Window(16, 8, 3, 3), Window(24, 8, 2, 3), Window(32, 8, 2, 3)]
    assert settled._replace(sub_block_length=None).window(0, 0, 32) is None


class Play(NamedTuple):
    """A block to be played: known tokens at its start, a limit, a first token of its own, and what each step finds."""

    rule: str
    parts: int
    length: int
    steps: int
    known: int
    limit: int
    threshold: float
    seed: int


@st.composite
def plays(draw: st.DrawFn) -> Play:
    parts, length = draw(st.integers(2, 5)), draw(st.integers(1, 5))
    block = parts * length
    limit = draw(st.integers(1, block))
    known = draw(st.integers(0, limit - 1))
    steps, threshold = draw(st.integers(parts, block)), draw(st.sampled_from(LEVELS))
    rule, seed = draw(st.sampled_from(RULES)), draw(st.integers(0, 2**20))
    return Play(rule, parts, length, steps, known, limit, threshold, seed)


@settings(max_examples=300, deadline=None)
@given(plays())
def test_blocks_equal_nested_loops_and_end(play: Play) -> None:
    """Only masks of the leftmost sub-block that has any are accepted, as if it were a block; the plan holds."""
    size = play.parts * play.length
    chance = np.random.default_rng(play.seed)
    sure = chance.choice(LEVELS, size=(size, size)).tolist()  # by step and offset
    settled = DecodingParams(play.rule, play.threshold, play.steps, sub_block_length=play.length)
    block = DiffusionBlock(0, np.arange(play.known), play.limit, size, -1, sub_block_length=play.length)
    taken: list[set[int]] = []
    while not block.complete:
        window = settled.window(block.sub_block, block.sub_steps, size)
        nothing = np.empty(0, dtype=np.int64)
        item = WorkItem(ForwardMode.DENOISE, block.tokens, 0, nothing, candidates=block.candidates, decoding=settled)
        item = item._replace(step=block.step, window=window)
        offsets = asked(item)
        assert unmaskable(item).all()
        step, steps, length = plan(item, size)
        rows = [(int(o), sure[block.step][int(o)]) for o in offsets]
        candidates = candidates_of(size, [(rows, step, steps, play.threshold)])
        candidates = candidates._replace(length_S=candidates.length_S * 0 + length)
        [chosen] = by_block(load_algorithm(play.rule).accept(candidates), candidates)
        first = min(o for o in range(play.limit) if block.masked[o])
        assert chosen and all(o // play.length == first // play.length and block.masked[o] for o in chosen)
        taken.append(chosen)
        mine = np.array(sorted(chosen))
        block.accept(mine, mine, np.zeros(mine.size))
    assert taken == nested_loops(play, sure)
    assert len(taken) <= play.steps


def nested_loops(play: Play, sure: list[list[float]]) -> list[set[int]]:
    """Sub-block by sub-block, each a block of its own for the oracle of the algorithms."""
    taken: list[set[int]] = []
    for part in range(play.parts):
        left = {o for o in range(part * play.length, (part + 1) * play.length) if play.known <= o < play.limit}
        steps = play.steps // play.parts + (1 if part < play.steps % play.parts else 0)
        for step in range(steps):
            if not left:
                break
            rows = [(o, sure[len(taken)][o]) for o in sorted(left)]
            measures = ({o: measure(o, c) for o, c in rows} for measure in (entropy_of, margin_of, lot_of))
            about = (rows, step, steps, play.length, play.threshold, BOUND)
            chosen = oracle.accepted_offsets(play.rule, *about, *measures)
            taken.append(chosen)
            left -= chosen
        assert not left
    return taken


def test_a_first_token_may_open_the_second_sub_block() -> None:
    block = DiffusionBlock(0, np.arange(0), 8, 8, -1, sub_block_length=1)
    block.foretell(FirstToken(5, -0.5, None))
    assert (block.sub_block, block.sub_steps) == (1, 0)
