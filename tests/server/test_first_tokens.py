"""The first token of a prompt where no row speaks for it: null in both APIs, and the rest as scored independently."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import torch

from losa_runtime.core.config import EngineConfig
from losa_runtime.engine import Engine
from losa_runtime.models.random_checkpoint import write_random_checkpoint
from tests.engine import plain_loop
from tests.server.app_server import AppServer
from tests.server.openai.conftest import client_of

BLOCK = 8
IDS = [30 + 7 * i % 90 for i in range(19)]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    folder = tmp_path_factory.mktemp("shifted")
    write_random_checkpoint(folder, architecture="Fast_dLLM_QwenForCausalLM", seed=5, block_size=BLOCK)
    return Engine(EngineConfig.parse(model=str(folder), page_size=BLOCK, max_total_tokens=1024, show_progress=False))


@pytest.fixture(scope="module")
def shifted(engine: Engine) -> Iterator[AppServer]:
    with AppServer(engine.config.model, engine=engine) as running:
        yield running


def scores(engine: Engine, ids: list[int]) -> list[Any]:
    """Nothing for the first; then each by the row before it, with masks from there to the end of its block."""
    model, about = engine.parts.runner.model, engine.parts.model_config
    found: list[Any] = [None]
    for i in range(1, len(ids)):
        masks = [about.mask_token_id] * (-i % BLOCK)
        logits = plain_loop.forward(model, ids[:i] + masks)[i - 1].double()
        logits[about.mask_token_id] = logits[engine.parts.tokenizer.vocab_size :] = -torch.inf
        found.append(float(logits.log_softmax(-1)[ids[i]]))
    return found


@pytest.mark.parametrize("length", [1, BLOCK, 19])
def test_native(engine: Engine, shifted: AppServer, length: int) -> None:
    ids = IDS[:length]
    body: dict[str, Any] = {"input_ids": ids, "return_logprob": True, "logprob_start_len": 0}
    body |= {"top_logprobs_num": 2, "token_ids_logprob": [40, 41], "return_text_in_logprobs": True}
    for new in (0, 3):
        params = {"max_new_tokens": new, "temperature": 0, "ignore_eos": True}
        reply = httpx.post(f"{shifted.url}/generate", json={**body, "sampling_params": params}, timeout=60)
        assert reply.status_code == 200, reply.text
        meta = reply.json()["meta_info"]
        entries = meta["input_token_logprobs"]
        assert entries[0] == [None, ids[0], chr(ids[0])]
        assert [token for _, token, _ in entries] == ids
        assert [value for value, _, _ in entries] == pytest.approx(scores(engine, ids), abs=1e-4)
        for name, count in (("input_top_logprobs", 2), ("input_token_ids_logprobs", 2)):
            assert meta[name][0] is None and [len(row) for row in meta[name][1:]] == [count] * (length - 1)
        assert len(meta["output_token_logprobs"]) == new


def test_openai(engine: Engine, shifted: AppServer) -> None:
    with client_of(shifted) as client:
        for tops in (0, 2):
            answer = client.completions.create(
                model="default", prompt=IDS, echo=True, max_tokens=2, logprobs=tops, temperature=0
            )
            found = answer.choices[0].logprobs
            assert found is not None and found.token_logprobs is not None and found.tokens is not None
            assert found.token_logprobs[:19] == pytest.approx(scores(engine, IDS), abs=1e-4)
            assert found.tokens[:19] == [chr(i) for i in IDS] and None not in found.token_logprobs[1:]
            if tops:
                rows: Any = found.top_logprobs
                assert rows[0] is None and all(len(row) >= 2 for row in rows[1:])
            else:
                assert found.top_logprobs is None


def test_sglangs_rules_of_select(shifted: AppServer) -> None:
    """Also the one that scores each choice without its prompt, from its first token on."""
    import sglang as sgl

    @sgl.function
    def program(s: Any, rule: Any) -> None:
        s += "abc abc ab"
        s += sgl.select("choice", choices=["c", "d", "ef"], choices_method=rule)

    rules = (sgl.token_length_normalized, sgl.greedy_token_selection, sgl.unconditional_likelihood_normalized)
    backend = sgl.RuntimeEndpoint(shifted.url)
    for rule in rules:
        state = program.run(rule=rule, backend=backend)
        assert state["choice"] in ("c", "d", "ef")
    alone = state.get_meta_info("choice")["unconditional_token_logprobs"]
    assert [row[0][0] for row in alone] == [None] * 3 and all(row[1][0] < 0 for row in alone if len(row) > 1)
