"""The three algorithms against the oracle, the schedule, and the settling of a request's decoding parameters."""

from __future__ import annotations

import random
import subprocess
import sys
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from losa_runtime.core.config import EngineConfig
from losa_runtime.core.decoding_params import DecodingParams
from losa_runtime.core.errors import ConfigError, InvalidRequest
from losa_runtime.core.sampling_params import DiffusionParams
from losa_runtime.decoding.algorithm import Candidates, accept, num_transfer
from losa_runtime.decoding.registry import ALGORITHMS, KNOBS, load_algorithm, resolve
from tests.decoding import oracle

# (candidates as (offset, confidence), step, planned steps, threshold); few confidences, so that ties are common.
Block = tuple[list[tuple[int, float]], int, int, float]
confidence = st.sampled_from([0.0, 0.125, 0.25, 0.5, 0.75, 0.875, 1.0])


@st.composite
def block(draw: st.DrawFn, block_length: int) -> Block:
    offsets = draw(st.lists(st.integers(0, block_length - 1), unique=True, max_size=block_length))
    steps = draw(st.integers(1, block_length))
    return [(o, draw(confidence)) for o in offsets], draw(st.integers(0, steps)), steps, draw(confidence)


@st.composite
def batch(draw: st.DrawFn) -> tuple[int, list[Block], list[str]]:
    block_length = draw(st.integers(1, 9))
    blocks = draw(st.lists(block(block_length), max_size=5))
    names = draw(st.lists(st.sampled_from(sorted(ALGORITHMS)), min_size=len(blocks), max_size=len(blocks)))
    return block_length, blocks, names


def candidates_of(block_length: int, blocks: list[Block]) -> Candidates:
    rows = [row for rows, *_ in blocks for row in rows]
    ends = [0]
    for mine, *_ in blocks:
        ends.append(ends[-1] + len(mine))
    return Candidates(
        token_R=torch.arange(len(rows)),
        confidence_R=torch.tensor([c for _, c in rows], dtype=torch.float32),
        offset_R=torch.tensor([o for o, _ in rows], dtype=torch.int64),
        indptr_S=torch.tensor(ends),
        step_index_S=torch.tensor([b[1] for b in blocks], dtype=torch.int64),
        num_steps_S=torch.tensor([b[2] for b in blocks], dtype=torch.int64),
        length_S=torch.full((len(blocks),), block_length),
        threshold_S=torch.tensor([b[3] for b in blocks], dtype=torch.float64),
        entropy_bound_S=torch.tensor([BOUND for _ in blocks], dtype=torch.float64),
        current_R=torch.full((len(rows),), MASK),
        masked_R=torch.ones(len(rows), dtype=torch.bool),
        edit_threshold_S=torch.ones(len(blocks), dtype=torch.float64),
        post_edit_steps_S=torch.zeros(len(blocks), dtype=torch.int64),
        post_steps_S=torch.zeros(len(blocks), dtype=torch.int64),
        block_length=block_length,
        entropy_R=torch.tensor([entropy_of(o, c) for o, c in rows], dtype=torch.float32),
        margin_R=torch.tensor([margin_of(o, c) for o, c in rows], dtype=torch.float32),
        order_R=torch.tensor([lot_of(o, c) for o, c in rows], dtype=torch.float64),
    )


BOUND, MASK = 0.75, -1


def entropy_of(offset: int, confidence: float) -> float:
    """Made up, exact in binary, often equal, not in the order of the confidences."""
    return round(4 * abs(confidence - 0.5)) / 4 + (offset % 3) / 8


def margin_of(offset: int, confidence: float) -> float:
    return round(4 * confidence) * 3 % 5 / 8 + (offset % 2) / 16


def lot_of(offset: int, confidence: float) -> float:
    return (offset * 7 + round(8 * confidence)) % 11 / 16


def by_block(accepted_R: torch.Tensor, candidates: Candidates) -> list[set[int]]:
    ends = candidates.indptr_S.tolist()
    return [set(candidates.offset_R[a:b][accepted_R[a:b]].tolist()) for a, b in pairwise(ends)]


@settings(max_examples=200, deadline=None)
@given(batch())
def test_equals_the_oracle_in_mixed_batches(case: tuple[int, list[Block], list[str]]) -> None:
    check(*case)


@pytest.mark.parametrize("block_length", [1, 2, 5, 8, 32])
def test_thousands_of_blocks_equal_the_oracle(block_length: int) -> None:
    """One call over many blocks: random residues, steps, plans and thresholds, half of them with many ties."""
    chance, blocks, levels = random.Random(block_length), [], [k / 8 for k in range(9)]
    for number in range(800):
        offsets = chance.sample(range(block_length), chance.randint(0, block_length))
        surety = [chance.choice(levels) if number % 2 else chance.random() for _ in offsets]
        steps = chance.randint(1, block_length)
        rows = list(zip(offsets, torch.tensor(surety).tolist(), strict=True))
        blocks.append((rows, chance.randint(0, steps), steps, chance.choice(levels)))
    check(block_length, blocks, [chance.choice(sorted(ALGORITHMS)) for _ in blocks])


def check(block_length: int, blocks: list[Block], names: list[str]) -> None:
    candidates = candidates_of(block_length, blocks)
    accepted_R, finished_S = accept([load_algorithm(name) for name in names], candidates)
    expected = [
        oracle.accepted_offsets(
            name,
            *(rows, step, steps, block_length, threshold, BOUND),
            *({o: measure(o, c) for o, c in rows} for measure in (entropy_of, margin_of, lot_of)),
        )
        for name, (rows, step, steps, threshold) in zip(names, blocks, strict=True)
    ]
    assert by_block(accepted_R, candidates) == expected
    assert all(got or not rows for got, (rows, *_) in zip(expected, blocks, strict=True))
    assert finished_S.tolist() == [len(got) == len(rows) for got, (rows, *_) in zip(expected, blocks, strict=True)]


@pytest.mark.parametrize("name", sorted(name for name in ALGORITHMS if not load_algorithm(name).edits))
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_a_block_is_done_within_its_planned_steps(name: str, data: st.DataObject) -> None:
    block_length = data.draw(st.integers(1, 12))
    steps = data.draw(st.integers(1, block_length))
    masked = set(data.draw(st.lists(st.integers(0, block_length - 1), unique=True, min_size=1)))
    full, threshold, used = len(masked) == block_length, data.draw(confidence), 0
    for step in range(steps):
        candidates = candidates_of(
            block_length, [([(o, data.draw(confidence)) for o in masked], step, steps, threshold)]
        )
        taken = by_block(load_algorithm(name).accept(candidates), candidates)[0]
        assert taken
        masked -= taken
        used += 1
        if not masked:
            break
    assert not masked
    if full and not load_algorithm(name).knobs:
        assert used == steps  # the plan is exact for a block that starts all masked


def test_threshold_one_makes_dynamic_static() -> None:
    candidates = candidates_of(4, [([(0, 1.0), (1, 0.5), (2, 1.0), (3, 0.9)], 0, 4, 1.0)])
    dynamic = load_algorithm("low_confidence_dynamic").accept(candidates)
    assert torch.equal(dynamic, load_algorithm("low_confidence_static").accept(candidates))
    assert dynamic.tolist() == [True, False, False, False]


def test_a_confidence_equal_to_the_threshold_is_not_enough() -> None:
    candidates = candidates_of(4, [([(0, 0.5), (1, 0.75), (2, 0.75), (3, 0.5)], 0, 4, 0.5)])
    assert load_algorithm("low_confidence_dynamic").accept(candidates).tolist() == [False, True, True, False]


@pytest.mark.parametrize("block_length", [1, 4, 7, 32])
def test_the_schedule_hands_out_every_position_once(block_length: int) -> None:
    for steps in range(1, block_length + 1):
        plan = [num_transfer(s, steps, block_length) for s in range(steps + 3)]
        assert sum(plan) == block_length
        assert plan[steps:] == [0, 0, 0]
        assert sorted(plan[:steps], reverse=True) == plan[:steps]
        assert plan[0] - plan[steps - 1] <= 1


def config(**values: object) -> EngineConfig:
    return EngineConfig.parse(model="m", **values)


def test_resolve_prefers_the_request_then_the_engine_then_one_token_per_step() -> None:
    assert resolve(DiffusionParams(), config(), 32) == DecodingParams("low_confidence_dynamic", 0.9, 32)
    engine = config(algorithm="sequential", threshold=0.7, denoising_steps=8)
    assert resolve(DiffusionParams(), engine, 32) == DecodingParams("sequential", 0.7, 8)
    wish = DiffusionParams(algorithm="low_confidence_dynamic", threshold=0.0, denoising_steps=32)
    assert resolve(wish, engine, 32) == DecodingParams("low_confidence_dynamic", 0.0, 32)


def test_a_preset_stands_between_the_request_and_the_engine() -> None:
    engine = config(algorithm="sequential", threshold=0.7, denoising_steps=8)
    assert resolve(DiffusionParams(preset="sglang"), engine, 32) == DecodingParams("low_confidence_dynamic", 0.95, 8)
    own = DiffusionParams(preset="sdar", threshold=0.5, denoising_steps=4)
    assert resolve(own, engine, 32) == DecodingParams("low_confidence_dynamic", 0.5, 4)
    assert resolve(DiffusionParams(preset="lmdeploy", algorithm="margin"), engine, 32).algorithm == "margin"
    fast = resolve(DiffusionParams(preset="llada2.1-speed", post_edit_steps=3), engine, 32)
    assert fast == DecodingParams("joint_threshold", 0.5, 8, edit_threshold=0.0, post_edit_steps=3)
    with pytest.raises(InvalidRequest, match=r"custom_params\.preset: found 'vllm', allowed: one of sdar, lmdeploy"):
        resolve(DiffusionParams(preset="vllm"), engine, 32)


@pytest.mark.parametrize("name", sorted(ALGORITHMS))
def test_a_number_that_an_algorithm_does_not_read_is_refused(name: str) -> None:
    knobs = load_algorithm(name).knobs
    for knob in KNOBS:
        value = 3 if knob == "post_edit_steps" else 0.25
        wish = DiffusionParams.model_validate({"algorithm": name, knob: value})
        if knob in knobs:
            assert getattr(resolve(wish, config(), 8), knob) == value
        else:
            with pytest.raises(InvalidRequest, match=f"custom_params.{knob}: found {value}, allowed: absent: '{name}'"):
                resolve(wish, config(), 8)


def test_the_bound_counts_all_entropies_and_the_plan_is_the_least() -> None:
    """Entropies 0.125 and 0.25 are within a bound of 0.75, with 0.5 they are not; four planned take all in."""
    rows = [(1, 0.5), (2, 0.5), (0, 0.0), (3, 1.0)]
    assert [entropy_of(*row) for row in rows] == [0.125, 0.25, 0.5, 0.5]
    for steps, expected in ((4, {1, 2}), (1, {0, 1, 2, 3})):
        candidates = candidates_of(4, [(rows, 0, steps, 0.0)])
        assert by_block(load_algorithm("entropy_bounded").accept(candidates), candidates) == [expected]


@pytest.mark.parametrize(
    ("wish", "field", "allowed"),
    [
        ({"algorithm": "greedy"}, "custom_params.algorithm", "sequential, low_confidence_static"),
        ({"denoising_steps": 33}, "custom_params.denoising_steps", "1 to 32"),
    ],
)
def test_resolve_names_the_field_and_what_is_allowed(wish: dict, field: str, allowed: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        resolve(DiffusionParams(**wish), config(), 32)
    assert caught.value.field == field
    assert allowed in caught.value.allowed
    with pytest.raises(ConfigError, match=next(iter(wish))):
        resolve(DiffusionParams(), config(**wish), 32)


def test_names_are_known_without_loading_torch() -> None:
    code = "import sys; import losa_runtime.decoding.registry; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
