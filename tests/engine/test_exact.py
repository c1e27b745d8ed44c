"""The engine against the plain loop: token for token, and logit for logit, however requests are cut and batched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from losa_runtime import LLM, SamplingParams
from losa_runtime.core.sampling_params import DiffusionParams
from losa_runtime.sparse.method import METHODS, method_class
from tests.engine import plain_loop
from tests.sparse.cases import CASES

RULES = ["sequential", "low_confidence_static", "low_confidence_dynamic", "margin", "entropy_bounded"]


def greedy(new: int, **custom: Any) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_new_tokens=new, custom_params=DiffusionParams(**custom))


def prompt(length: int, seed: int) -> list[int]:
    return torch.randint(0, 256, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.fixture(scope="module", params=["auto", "torch"])
def tiny(tiny_checkpoint: Path, request: pytest.FixtureRequest) -> LLM:
    backend = request.param
    return LLM(model=str(tiny_checkpoint), attention_backend=backend, chunked_prefill_size=64, max_total_tokens=4096)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("length", "new", "steps"), [(1, 20, 16), (16, 33, 5), (31, 17, 16), (90, 40, 3), (48, 5, 7)])
def test_tokens_equal_the_plain_loop(tiny: LLM, rule: str, length: int, new: int, steps: int) -> None:
    ids = prompt(length, seed=length)
    knob = {"low_confidence_dynamic": ("threshold", 0.02), "entropy_bounded": ("entropy_bound", 12.0)}.get(rule)
    params = greedy(new, algorithm=rule, denoising_steps=steps, **({} if knob is None else dict([knob])))
    [got] = tiny.generate([ids], params)
    model, stop = tiny.engine.parts.runner.model, tuple(tiny.engine.parts.eos_token_ids)
    want = plain_loop.generate(model, ids, new, steps, rule, knob[1] if knob else 0.0, tiny.tokenizer.vocab_size, stop)
    assert list(got.token_ids) == want
    assert got.prompt_tokens == length


@pytest.mark.parametrize("rule", [(0.02, 0.0, 3, 0.0), (0.02, 0.008, 16, 0.5), (0.5, 0.0, 0, 0.0), (0.01, 0.0, 1, 4.0)])
@pytest.mark.parametrize(("length", "new"), [(1, 20), (31, 40), (48, 5)])
def test_edits_equal_the_plain_loop(tiny: LLM, rule: tuple[float, float, int, float], length: int, new: int) -> None:
    ids = prompt(length, seed=length)
    names = ("threshold", "edit_threshold", "post_edit_steps", "neighbour_penalty")
    [got] = tiny.generate([ids], greedy(new, algorithm="joint_threshold", **dict(zip(names, rule, strict=True))))
    model, stop = tiny.engine.parts.runner.model, tuple(tiny.engine.parts.eos_token_ids)
    want, edits = plain_loop.generate_with_edits(model, ids, new, rule, tiny.tokenizer.vocab_size, stop)
    assert list(got.token_ids) == want
    assert edits > 0 or rule[2] == 0 or new < 6


def test_small_blocks_in_larger_pages_equal_the_plain_loop(tiny_b4_checkpoint: Path) -> None:
    llm = LLM(model=str(tiny_b4_checkpoint), max_total_tokens=2048)
    for length in (1, 4, 15, 16, 30):
        ids = prompt(length, seed=7 * length)
        [got] = llm.generate([ids], greedy(22, algorithm="low_confidence_static", denoising_steps=2))
        want = plain_loop.generate(
            llm.engine.parts.runner.model, ids, 22, 2, "low_confidence_static",
            vocab_size=llm.tokenizer.vocab_size, stop=tuple(llm.engine.parts.eos_token_ids),
        )  # fmt: skip
        assert list(got.token_ids) == want, length


def test_logits_equal_the_plain_loop(tiny: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens of a peaked model can agree by luck; the logits of every step must agree too."""
    model = tiny.engine.parts.runner.model
    seen: list[Tensor] = []
    original = type(model).logits

    def recording(self: Any, hidden: Tensor) -> Tensor:
        logits = original(self, hidden)
        seen.append(logits.clone())
        return logits

    ids = prompt(75, seed=3)
    with monkeypatch.context() as patch:
        patch.setattr(type(model), "logits", recording)
        tiny.engine.flush_cache()
        tiny.generate([ids], greedy(37, algorithm="low_confidence_static", denoising_steps=6))
    want: list[Tensor] = []
    plain_loop.generate(
        model, ids, 37, 6, "low_confidence_static", vocab_size=tiny.tokenizer.vocab_size,
        stop=tuple(tiny.engine.parts.eos_token_ids), seen_logits=want,
    )  # fmt: skip
    assert len(seen) == len(want)
    for mine, theirs in zip(seen, want, strict=True):
        finite = torch.isfinite(theirs)  # the loop bans ids in place after recording
        assert (mine - theirs)[finite].abs().max() < 2e-4


@pytest.fixture(scope="module")
def mixed() -> list[tuple[list[int], SamplingParams]]:
    """Requests that differ in everything a request may differ in."""
    shared = prompt(40, seed=0)
    return [
        (shared + prompt(5, 1), greedy(30, algorithm="sequential")),
        (shared + prompt(9, 2), greedy(21, sparse_method="losa", token_budget=16, denoising_steps=4)),
        (prompt(70, 3), SamplingParams(temperature=0.9, sampling_seed=5, max_new_tokens=18, top_p=0.8)),
        (prompt(3, 4), SamplingParams(temperature=1.3, sampling_seed=6, max_new_tokens=40, top_k=20, ignore_eos=True)),
        (prompt(64, 5), greedy(16, sparse_method="quest", token_budget=32, algorithm="low_confidence_static")),
        (shared, SamplingParams(temperature=0.7, sampling_seed=7, max_new_tokens=25, frequency_penalty=0.5)),
    ]


@pytest.fixture(scope="module")
def alone(tiny_checkpoint: Path, mixed: list[tuple[list[int], SamplingParams]]) -> list[tuple[int, ...]]:
    llm = LLM(model=str(tiny_checkpoint), disable_radix_cache=True, disable_fused_commit=True, max_total_tokens=4096)
    return [llm.generate([ids], params)[0].token_ids for ids, params in mixed]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"chunked_prefill_size": 16},
        {"disable_fused_commit": True, "chunked_prefill_size": 48},
        {"max_running_requests": 2},
        {"max_total_tokens": 112},
        {"disable_radix_cache": True, "max_total_tokens": 128},
    ],
    ids=str,
)
def test_company_cuts_caches_and_retraction_change_nothing(
    tiny_checkpoint: Path,
    mixed: list[tuple[list[int], SamplingParams]],
    alone: list[tuple[int, ...]],
    options: dict[str, Any],
) -> None:
    llm = LLM(model=str(tiny_checkpoint), **{"max_total_tokens": 4096, **options})
    retractions = 0
    for _ in range(2):  # the second time on a warm cache
        got = llm.generate([ids for ids, _ in mixed], [params for _, params in mixed])
        assert [g.token_ids for g in got] == alone
        retractions += sum(g.stats.retractions for g in got)
    assert (retractions > 0) == ("max_total_tokens" in options), "the small pools are there to force retractions"
    assert llm.engine.parts.cache.owned_pages == 0


@pytest.mark.parametrize("page_size", [4, 8])
def test_blocks_larger_than_a_page_do_not_mind_company(
    tiny_checkpoint: Path, mixed: list[tuple[list[int], SamplingParams]], page_size: int
) -> None:
    options: dict[str, Any] = {"page_size": page_size, "max_total_tokens": 4096}
    single = LLM(model=str(tiny_checkpoint), disable_radix_cache=True, disable_fused_commit=True, **options)
    alone = [single.generate([ids], params)[0].token_ids for ids, params in mixed]
    for more in ({"chunked_prefill_size": 32}, {"max_total_tokens": 112}):
        llm = LLM(model=str(tiny_checkpoint), **{**options, **more})
        for _ in range(2):
            got = llm.generate([ids for ids, _ in mixed], [params for _, params in mixed])
            assert [g.token_ids for g in got] == alone


def test_a_warm_cache_skips_the_prefill(tiny: LLM) -> None:
    ids = prompt(80, seed=11)
    tiny.engine.flush_cache()
    [cold] = tiny.generate([ids], greedy(4))
    [warm] = tiny.generate([ids], greedy(4))
    assert (cold.cached_tokens, warm.cached_tokens) == (0, 80)
    assert warm.stats.forwards < cold.stats.forwards
    assert warm.token_ids == cold.token_ids


@pytest.mark.parametrize("method", [name for name in METHODS if name != "dense"])
def test_full_budget_equals_dense(tiny: LLM, method: str) -> None:
    ids, asks = prompt(100, seed=12), {"sparse_method": method, "sparse_options": CASES[method].full}
    if method_class(method).has_budget:
        asks["token_budget"] = 512
    if method_class(method).has_active_rows:
        asks["active_tokens"] = 16
    [dense] = tiny.generate([ids], greedy(40, sparse_method="dense"))
    [sparse] = tiny.generate([ids], greedy(40, **asks))
    assert dense.token_ids == sparse.token_ids


@pytest.mark.parametrize("method", METHODS)
def test_every_method_accounts_for_its_bytes(tiny: LLM, method: str) -> None:
    """Per request, and added up over the engine."""
    wish: dict[str, Any] = {"token_budget": 32} if method_class(method).has_budget else {}
    if method == "flashblock":
        wish = {"sparse_options": {"refresh_tokens": 6}}  # two tokens are accepted per step
    before = tiny.engine.stats()
    fixed = {"algorithm": "low_confidence_static", "denoising_steps": 8}
    answers = tiny.generate([prompt(320, seed=n) for n in (1, 2)], greedy(32, sparse_method=method, **wish, **fixed))
    after = tiny.engine.stats()
    for field in ("kv_bytes", "metadata_bytes", "dense_bytes", "denoise_steps"):
        total = sum(getattr(answer.stats, field) for answer in answers)
        assert isinstance(after[field], int) and after[field] - before[field] == total
    for answer in answers:
        stats, config = answer.stats, tiny.engine.parts.model_config
        vector = config.num_layers * config.num_kv_heads * config.head_dim * 4
        assert stats.dense_bytes == 8 * (320 + 336) * 2 * vector
        assert stats.block_bytes_ratio == (stats.kv_bytes + stats.metadata_bytes) / stats.dense_bytes
        assert stats.bytes_ratio is not None and stats.active_overlap is not None
        if method == "dense":
            assert stats.bytes_ratio == stats.block_bytes_ratio == stats.active_overlap == 1.0
        else:
            assert stats.bytes_ratio < 0.75 and stats.block_bytes_ratio < 1.0


def test_scoring_is_not_counted_as_denoising(tiny: LLM) -> None:
    before = tiny.engine.stats()
    tiny.score([prompt(40, seed=15)], start=3)
    after = tiny.engine.stats()
    assert after["forwards"] != before["forwards"]
    counted = ("denoise_steps", "kv_bytes", "metadata_bytes", "dense_bytes", "block_bytes_ratio")
    assert [after[field] for field in counted] == [before[field] for field in counted]


def test_sparse_requests_report_what_they_read(tiny: LLM) -> None:
    ids = prompt(320, seed=13)
    fixed = {"algorithm": "low_confidence_static", "denoising_steps": 8}
    [losa] = tiny.generate([ids], greedy(32, sparse_method="losa", token_budget=32, **fixed))
    [quest] = tiny.generate([ids], greedy(32, sparse_method="quest", token_budget=32, **fixed))
    [dense] = tiny.generate([ids], greedy(32, sparse_method="dense", **fixed))
    assert dense.stats.kv_density == 1.0 and dense.stats.dense_steps == dense.stats.denoise_steps == 16
    assert losa.stats.dense_steps == 2 and losa.stats.active_share == pytest.approx(5 / 16)
    assert losa.stats.kv_density is not None and quest.stats.kv_density is not None
    assert 0.1 <= losa.stats.kv_density < quest.stats.kv_density < 1.0


def test_scores_follow_the_chain_rule_inside_a_block(tiny: LLM) -> None:
    ids = prompt(40, seed=14)
    [scores] = tiny.score([ids], start=20)
    model, b = tiny.engine.parts.runner.model, 16
    mask, size = tiny.engine.parts.model_config.mask_token_id, tiny.tokenizer.vocab_size
    for i, score in zip(range(20, 40), scores, strict=True):
        start = i - i % b
        logits = plain_loop.forward(model, ids[:i] + [mask] * (start + b - i))[i].clone()
        logits[mask] = logits[size:] = -torch.inf
        assert score == pytest.approx(float(logits.log_softmax(-1)[ids[i]]), abs=1e-4)


@pytest.mark.parametrize("length", [300, 640])
def test_the_bundled_model_equals_the_plain_loop(bundled_checkpoint: Path, length: int) -> None:
    llm = LLM(model=str(bundled_checkpoint), max_total_tokens=4096)
    size = min(llm.tokenizer.vocab_size, llm.engine.parts.model_config.mask_token_id)
    ids = torch.randint(0, size, (length,), generator=torch.Generator().manual_seed(length)).tolist()
    [got] = llm.generate([ids], greedy(24, denoising_steps=16))
    want = plain_loop.generate(
        llm.engine.parts.runner.model, ids, 24, 16, vocab_size=llm.tokenizer.vocab_size,
        stop=tuple(llm.engine.parts.eos_token_ids),
    )  # fmt: skip
    assert list(got.token_ids) == want


def test_small_blocks_in_larger_pages_do_not_mind_company_either(tiny_b4_checkpoint: Path) -> None:
    shared = prompt(37, seed=0)
    customs = [
        DiffusionParams(),
        DiffusionParams(sparse_method="losa", token_budget=16),
        DiffusionParams(sparse_method="quest", token_budget=16),
        DiffusionParams(sparse_method="losa", token_budget=32, active_tokens=1),
    ]

    def params(seed: int, custom: DiffusionParams) -> SamplingParams:
        return SamplingParams(
            temperature=0.8, sampling_seed=seed, max_new_tokens=30, ignore_eos=True, custom_params=custom
        )

    wishes = [(shared + prompt(6 * n, n), params(n, c)) for n, c in enumerate(customs)]
    single = LLM(model=str(tiny_b4_checkpoint), max_total_tokens=1024, disable_radix_cache=True)
    alone = [single.generate([ids], wish)[0].token_ids for ids, wish in wishes]
    retractions = 0
    for options in (
        {"max_total_tokens": 1024, "chunked_prefill_size": 8},
        {"max_total_tokens": 96},
        {"max_total_tokens": 112},
    ):
        llm = LLM(model=str(tiny_b4_checkpoint), **options)
        for _ in range(2):
            got = llm.generate([ids for ids, _ in wishes], [wish for _, wish in wishes])
            assert [g.token_ids for g in got] == alone
            retractions += sum(g.stats.retractions for g in got)
    assert retractions > 0
