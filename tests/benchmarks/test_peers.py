"""The comparison with peers: the plain loops give the engine's tokens, servers can take part, and a peer that does
other work is found before anything is timed."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.peers import __main__ as program
from benchmarks.peers.ours import Ours, room_for
from benchmarks.peers.peer import Answer, Peer, Prompt, Task, common_prefix, visible
from benchmarks.peers.plain_loop import Batched, OneByOne, Reusing, load_transformers
from benchmarks.peers.race import Differs, Race, same, speeds
from benchmarks.peers.servers import OpenAIPeer, ServerError, SGLangPeer, server_peer
from benchmarks.peers.workload import Facts, facts_of, prompts_over_document, task_for
from losa_runtime.models.random_checkpoint import write_random_checkpoint
from losa_server.bench.running_server import RunningServer

SMALL = "--document 90 --counts 1 3 --output 21 --rounds 1 --threads 1 --budget 16"


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint")
    write_random_checkpoint(path, block_size=8, max_position_embeddings=512, seed=5)
    # Sharper attention that weighs more: answers then differ by prompt and by place, as those of a trained model do.
    tensors = load_file(path / "model.safetensors")
    for name, tensor in tensors.items():
        if "q_norm" in name or "o_proj" in name:
            tensor *= 4
    save_file(tensors, path / "model.safetensors")
    return path


@pytest.fixture(scope="module")
def facts(folder: Path) -> Facts:
    return facts_of(folder)[0]


@pytest.fixture(scope="module")
def prompts(folder: Path) -> list[Prompt]:
    """Over one document, of different lengths modulo the block; the last shares nothing and is the shortest."""
    found = prompts_over_document(facts_of(folder)[1], 70, 4)
    assert len({len(prompt) % 8 for prompt in found}) > 1 and common_prefix(found[0], found[1]) >= 70
    return [*found, tuple(range(40, 61))]


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return load_transformers(folder)


def engine_answers(facts: Facts, prompts: Sequence[Prompt], task: Task, variant: str = "dense") -> list[Answer]:
    return Ours(variant, facts, len(prompts), room_for(prompts, task, shared=False), 16).answer(prompts, task)


@pytest.mark.parametrize(("steps", "threshold"), [(None, 0.9), (None, 0.02), (3, 0.02), (3, 1.0)])
def test_the_plain_loops_give_the_tokens_of_the_engine(
    facts: Facts, prompts: list[Prompt], model: Any, steps: int | None, threshold: float
) -> None:
    task = task_for(facts, 21, steps, threshold, stops=False)
    wanted = [answer.token_ids for answer in engine_answers(facts, prompts, task)]
    assert all(ids is not None and len(ids) == 21 and len(set(ids)) > 4 for ids in wanted)
    assert len(set(wanted)) == len(prompts), "every prompt has an answer of its own"
    for kind in (OneByOne, Reusing, Batched):
        peer = kind(model, facts)
        for again in range(2):  # what is remembered from the first time must not matter
            assert [answer.token_ids for answer in peer.answer(prompts, task)] == wanted, (peer.name, again)


def test_answers_end_at_their_first_stop_token(facts: Facts, prompts: list[Prompt], model: Any) -> None:
    free = Task(21, facts.block_length, 0.9, frozenset(), ignore_stops=True)
    outputs = [answer.token_ids or () for answer in OneByOne(model, facts).answer(prompts, free)]
    places: dict[int, set[int]] = {}
    for ids in outputs:
        for token in ids:
            places.setdefault(token, set()).add(ids.index(token))
    stop = max(places, key=lambda token: len(places[token]))
    task = Task(21, free.steps, 0.9, frozenset({stop}), ignore_stops=False)
    found = OneByOne(model, facts).answer(prompts, task)
    assert len({answer.tokens for answer in found}) > 1, "rows end at different places"
    for answer in found:
        assert answer.token_ids is not None and not set(answer.token_ids[:-1]) & task.stop_ids
    for kind in (Reusing, Batched):
        assert kind(model, facts).answer(prompts, task) == found


def test_what_is_visible() -> None:
    task = Task(8, 4, 0.9, frozenset({7}), ignore_stops=False)
    assert visible([1, 7, 2, 7], task) == Answer(2, (1, 7))
    assert visible([1, 2], task) == Answer(2, (1, 2))
    assert visible([1, 7, 2], Task(8, 4, 0.9, frozenset({7}), ignore_stops=True)) == Answer(3, (1, 7, 2))


def test_the_same_answer_is_one_of_ids_or_of_texts() -> None:
    assert same(Answer(2, (1, 2), "a"), Answer(2, (1, 2), "b")), "ids say more than texts"
    assert not same(Answer(2, (1, 2), "a"), Answer(2, (1, 3), "a"))
    assert same(Answer(2, None, "a"), Answer(2, (1, 2), "a")) and not same(Answer(3, None, "a"), Answer(2, (1,), "a"))
    assert not same(Answer(2, None, None), Answer(2, (1, 2), None))


def test_the_program_proves_then_measures(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "rows.jsonl"
    assert program.main([*SMALL.split(), "--model", str(folder), "--results", str(file)]) == 0
    row = json.loads(capsys.readouterr().out.splitlines()[-1])
    everyone = {*program.BASELINES, *program.VARIANTS}
    assert set(row["tokens_per_s"]) == everyone == set(row["equal_answers"])
    assert all(share == 1.0 for name, share in row["equal_answers"].items() if name != "losa")
    speed = row["tokens_per_s"]
    for count in ("1", "3"):
        for base in ("b1", "batched"):
            ratio = speed["dense"][count] / speed[f"transformers_{base}"][count]
            assert row[f"speedup_vs_transformers_{base}"][count] == pytest.approx(ratio, rel=0.02, abs=0.01)
    assert all(len(times) == 1 for by in row["seconds"].values() for times in by.values())
    [kept] = [json.loads(line) for line in file.read_text().splitlines()]
    assert row.items() <= kept.items() and "commit" in kept


class _Liar(Peer):
    """Says what another peer says, but for one token of one answer."""

    def __init__(self, other: Peer, from_call: int, exact: bool = True) -> None:
        self.other, self.from_call, self.calls = other, from_call, 0
        self.name, self.exact = "liar", exact

    def answer(self, prompts: Sequence[Prompt], task: Task) -> list[Answer]:
        found = self.other.answer(prompts, task)
        self.calls += 1
        if self.calls > self.from_call:
            ids = found[0].token_ids or ()
            found[0] = Answer(len(ids), (*ids[:-1], ids[-1] + 1))
        return found


def test_who_does_other_work_is_not_timed(facts: Facts, prompts: list[Prompt], model: Any) -> None:
    task, loop = task_for(facts, 9, None, 0.9, stops=False), OneByOne(model, facts)
    race = Race([loop, _Liar(loop, 0)], prompts[:2], task, str, sample=2)
    with pytest.raises(Differs, match=r"liar answers prompt 0 with .* 1 of 2 differ"):
        race.prove(lambda _: None)
    later = Race([loop, _Liar(loop, 1)], prompts[:2], task, str, sample=2)
    later.prove(lambda _: None)
    with pytest.raises(Differs, match="liar"):
        later.run([2], 1, lambda _: None)
    allowed = Race([loop, _Liar(loop, 0, exact=False)], prompts[:2], task, str, sample=1)
    allowed.prove(lambda _: None)
    assert allowed.equal == {"transformers_b1": 1.0, "liar": 0.5}
    runs = allowed.run([2], 2, lambda _: None)
    assert [(run.peer, run.requests, run.tokens) for run in runs] == 2 * [("transformers_b1", 2, 9), ("liar", 2, 18)]
    assert set(speeds(runs)) == {"transformers_b1", "liar"}


def test_servers_take_part_by_url(
    folder: Path, facts: Facts, prompts: list[Prompt], model: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    task = task_for(facts, 13, None, 0.9, stops=False)
    with RunningServer(str(folder), ["--log-level", "warning"]) as server:
        loop = OneByOne(model, facts)
        peers = [loop, server_peer(f"sglang={server.url}"), server_peer(f"openai={server.url}")]
        assert [type(peer) for peer in peers] == [OneByOne, SGLangPeer, OpenAIPeer]
        race = Race(peers, prompts, task, facts_of(folder)[1].decode, sample=1)
        race.prove(lambda _: None)
        assert list(race.equal.values()) == [1.0, 1.0, 1.0]
        runs = race.run([3], 1, lambda _: None)
        assert [(run.peer, run.tokens) for run in runs][1:] == [(peer.name, 39) for peer in peers[1:]]
        assert [peer.cold for peer in peers] == [True, True, False]
        cached = server.post("/generate", {"input_ids": list(prompts[0]), "sampling_params": {"max_new_tokens": 1}})
        assert cached["meta_info"]["cached_tokens"] > 0
        peers[1].reset()
        cached = server.post("/generate", {"input_ids": list(prompts[0]), "sampling_params": {"max_new_tokens": 1}})
        assert cached["meta_info"]["cached_tokens"] == 0
        other = '{"sampling_params": {"max_new_tokens": 5}, "custom_logit_processor": null}'
        assert server_peer(f"sglang={server.url}", other).answer(prompts[:1], task)[0].tokens == 5
        refused = server_peer(f"openai={server.url}", '{"max_tokens": -3}')
        with pytest.raises(ServerError, match=r"400.*max_tokens"):
            refused.answer(prompts[:1], task)
        arguments = [*SMALL.split(), "--model", str(folder), "--variants", "--baselines", "--server"]
        assert program.main([*arguments, f"sglang={server.url}", "--server-fields", '{"stream": true}']) == 1
        assert "/generate: JSONDecodeError" in capsys.readouterr().err
        assert program.main([*arguments, f"openai={server.url}"]) == 0
        row = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert row["warm_between_runs"] == [f"openai {server.url}"]
        for peer in peers:
            peer.close()
    with pytest.raises(ServerError, match="ConnectError"):
        server_peer(f"sglang={server.url}").reset()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--server", "vllm=http://x"], "found 'vllm=http://x', allowed: KIND=URL with KIND one of sglang, openai"),
        (["--server", "sglang=localhost"], "an http URL"),
        (["--server", "sglang=http://x", "--server-fields", "[1]"], "found '[1]', allowed: a JSON object"),
        (["--server", "sglang=http://x", "--server-fields", "{"], "Expecting"),
        (["--cpu-time"], "--cpu-time: allowed with --threads 1 and no --server"),
        (["--document", "500"], "allowed: 512 of this model"),
    ],
)
def test_wrong_arguments_are_refused(
    folder: Path, arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        program.main([*arguments, "--model", str(folder)])
    assert words in capsys.readouterr().err
