"""Log-probabilities of other ids, against the plain distribution: row by row, whatever shares the call."""

from __future__ import annotations

import math

import pytest
import torch

from losa_runtime.core.sampling_params import SamplingParams
from losa_runtime.core.work import RowContext
from losa_runtime.decoding import sampling
from losa_runtime.decoding.sampling import Bans, SamplingRows, sample
from losa_runtime.runner.alternatives import per_row, wanted
from tests.decoding import oracle

MASK, V = 3, 12


def context(top: int, ids: tuple[int, ...] = ()) -> RowContext:
    nothing = torch.zeros(0, dtype=torch.int32).numpy()
    return RowContext(SamplingParams(), 0, (), (), 0, nothing, nothing, top, ids)


def rows(temperatures: list[float]) -> SamplingRows:
    R = len(temperatures)
    ones = torch.ones(R, dtype=torch.float64)
    # top_k 1 and a tiny nucleus: filters must not show in what is reported.
    return SamplingRows(torch.tensor(temperatures), torch.ones(R, dtype=torch.int64), ones * 0.1, ones * 0.9, ones / 3)


@pytest.mark.parametrize("height", [1, 2, 100])
def test_values_are_those_of_the_tempered_unfiltered_distribution(monkeypatch: pytest.MonkeyPatch, height: int) -> None:
    monkeypatch.setattr(sampling, "_ELEMENTS_PER_PASS", height * V)
    logits = torch.randn(6, V, generator=torch.Generator().manual_seed(4)) * 3
    temperatures = [0.0, 0.0, 0.5, 0.5, 2.0, 1.0]
    contexts, sizes = [context(4, (7, 0)), context(0), context(1), context(0, (5,))], [2, 1, 2, 1]
    bans = Bans(MASK, V - 1, torch.tensor([0]), torch.tensor([7]))
    drawn = sample(logits, rows(temperatures), bans, wanted=wanted(contexts, sizes, logits.device))
    assert drawn.others is not None
    found = per_row(contexts, sizes, drawn.others)
    owners = [0, 0, 1, 2, 2, 3]
    for row, (other, owner) in enumerate(zip(found, owners, strict=True)):
        banned = {MASK, V - 1} | ({7} if row == 0 else set())
        p = oracle.distribution(logits[row].tolist(), temperatures[row], banned)
        log = [math.log(value) if value else -math.inf for value in p]
        want = contexts[owner]
        if other is None:
            assert not want.top_logprobs and not want.logprob_ids
            continue
        best = sorted(range(V), key=lambda i: -log[i])[: want.top_logprobs]
        assert other.top_ids == tuple(best)
        assert other.top_logprobs == pytest.approx([log[i] for i in best], abs=1e-6)
        assert other.asked == pytest.approx([log[i] for i in want.logprob_ids], abs=1e-6)
        if want.top_logprobs:
            assert other.top_logprobs[0] == pytest.approx(float(drawn.logprob_R[row]), abs=1e-6)  # top_k is 1


def test_asking_changes_nothing_else_and_nothing_is_made_unasked() -> None:
    logits = torch.randn(3, V, generator=torch.Generator().manual_seed(1))
    plain = sample(logits, rows([1.0] * 3), Bans(MASK, V))
    assert plain.others is None
    assert wanted([context(0)] * 2, [1, 2], logits.device) is None
    asked = sample(logits, rows([1.0] * 3), Bans(MASK, V), wanted=wanted([context(2)], [3], logits.device))
    assert torch.equal(plain.token_R, asked.token_R) and torch.equal(plain.logprob_R, asked.logprob_R)


def test_more_than_the_vocabulary() -> None:
    logits = torch.randn(1, V, generator=torch.Generator().manual_seed(2))
    drawn = sample(logits, rows([1.0]), Bans(MASK, V), wanted=wanted([context(100)], [1], logits.device))
    assert drawn.others is not None
    [other] = per_row([context(100)], [1], drawn.others)
    assert other is not None
    assert sorted(other.top_ids) == list(range(V)) and other.top_logprobs[-1] == -math.inf
