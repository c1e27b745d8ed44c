"""Penalties and bias against the definitions in plain Python, and their bounds."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from losa_runtime.core.errors import InvalidRequest
from losa_runtime.core.sampling_params import SamplingParams
from losa_runtime.decoding.penalties import PenaltyRows, check_logit_bias, has_penalties, penalise

V = 8
ids = st.lists(st.integers(0, V - 1), max_size=12)


def expected(logits: list[float], prompt: list[int], output: list[int], params: SamplingParams) -> list[float]:
    count, result = Counter(output), []
    for i, x in enumerate(logits):
        if i in count or i in prompt:
            x = x / params.repetition_penalty if x > 0 else x * params.repetition_penalty
        x -= params.frequency_penalty * count[i] + (params.presence_penalty if count[i] else 0.0)
        result.append(x + params.logit_bias.get(i, 0.0))
    return result


@st.composite
def params(draw: st.DrawFn) -> SamplingParams:
    return SamplingParams(
        frequency_penalty=draw(st.sampled_from([0.0, 0.5, -1.5])),
        presence_penalty=draw(st.sampled_from([0.0, 1.25, -2.0])),
        repetition_penalty=draw(st.sampled_from([1.0, 1.3, 0.7])),
        logit_bias=draw(st.dictionaries(st.integers(0, V - 1), st.sampled_from([-100.0, 2.5]), max_size=3)),
    )


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), ids, ids, params()), min_size=1, max_size=3), st.integers(0, 2**31))
def test_equals_the_definition_for_each_request(requests: list[tuple], seed: int) -> None:
    R = sum(r[0] for r in requests) + 1  # the last row belongs to nobody
    logits = torch.randn(R, V, generator=torch.Generator().manual_seed(seed))
    wishes, rows = [], list(range(R))
    for number, prompt, output, wish in requests:
        wishes.append(PenaltyRows(rows[:number], prompt, output, wish))
        del rows[:number]
    before = logits.clone()
    got = penalise(logits, wishes)
    assert torch.equal(logits, before)
    assert torch.equal(got[-1], logits[-1])
    for wish in wishes:
        for row in wish.rows:
            want = expected(logits[row].tolist(), list(wish.prompt_ids), list(wish.output_ids), wish.params)
            assert got[row].tolist() == pytest.approx(want, rel=1e-5, abs=1e-5)


def test_nothing_is_done_for_requests_without_wishes() -> None:
    logits = torch.zeros(2, V)
    assert not has_penalties(SamplingParams())
    assert penalise(logits, []) is logits
    assert penalise(logits, [PenaltyRows([0, 1], [1], [2], SamplingParams())]) is logits


@pytest.mark.parametrize(
    ("bias", "field"),
    [
        ({V: 1.0}, "sampling_params.logit_bias"),
        ({-1: 1.0}, "sampling_params.logit_bias"),
    ],
)
def test_a_bias_that_cannot_be_honoured_is_refused(bias: dict[int, float], field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        check_logit_bias(SamplingParams(logit_bias=bias), V)
    assert caught.value.field == field
    check_logit_bias(SamplingParams(logit_bias={0: -100.0, V - 1: 100.0}), V)
