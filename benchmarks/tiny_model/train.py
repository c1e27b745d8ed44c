"""Trains the bundled model: seeded, resumable, with a curriculum that advances only on learned stages.

    python -m benchmarks.tiny_model.train --name main --minutes 60

State lies under `benchmarks/tiny_model/runs/<name>/` and a later call with the same name continues it.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F

from benchmarks.tiny_model import network
from benchmarks.tiny_model.batches import IGNORE, LENGTH, Batch, Recipe, make_batch, make_cloze
from benchmarks.tiny_model.circuit import install
from benchmarks.tiny_model.network import (
    BLOCK,
    Layout,
    Network,
    Shape,
    additive,
    block_causal,
    rope_table,
    segment_visibility,
)
from benchmarks.tiny_model.stages import stage_recipe, stages
from benchmarks.tiny_model.tokenizer import load

HERE = Path(__file__).parent
DTYPE = torch.bfloat16
GAIN_RATE = 4.0


def question_layout(shape: Shape, batch: Batch) -> Layout:
    """The attention layout of a question batch."""
    visible = segment_visibility(batch.block, batch.instance, batch.clean)
    return Layout(
        doc=batch.doc.shape[1],
        segments=batch.ids.shape[1],
        length=LENGTH,
        rope=rope_table(batch.positions, shape.head_dim, shape.rope_theta),
        doc_mask=block_causal(batch.doc.shape[1], DTYPE),
        segment_mask=additive(visible, DTYPE),
        dtype=DTYPE,
    )


def question_loss(net: Network, batch: Batch) -> tuple[torch.Tensor, dict[str, list[float]]]:
    """Weighted cross-entropy on masked answer positions, and whole-answer hits of fully masked blocks by task."""
    B, n, S = batch.ids.shape
    T = batch.doc.shape[1]
    ids = torch.cat((batch.doc, batch.ids.view(B, n * S)), 1)
    hidden = net.hidden(ids, question_layout(net.shape, batch))[:, T:].reshape(B * n * S, -1)
    target, weight = batch.target.view(-1), batch.weight.view(-1)
    asked = (target != IGNORE).nonzero().squeeze(1)
    logits = net.logits(hidden[asked], DTYPE)
    losses = F.cross_entropy(logits, target[asked], reduction="none")
    loss = (losses * weight[asked]).sum() / weight[asked].sum()
    right = torch.ones(B * n * S, dtype=torch.bool)
    right[asked] = logits.argmax(-1) == target[asked]
    right |= weight == 0.05  # the fill behind the answer does not count
    hits: dict[str, list[float]] = {}
    counted = ((target != IGNORE) & (weight > 0.05)).view(B, n, S)  # ~task: share of right tokens at all mask rates
    share = (right.view(B, n, S) & counted).sum(-1) / counted.sum(-1).clamp(min=1)
    for b in range(B):
        for i in range(n):
            hits.setdefault("~" + batch.tasks[b][i], []).append(float(share[b, i]))
    first = right.view(B, n, -1, BLOCK)[:, :, (S // BLOCK) - 3].all(-1)
    for b, i in batch.whole.nonzero().tolist():
        hits.setdefault(batch.tasks[b][i], []).append(float(first[b, i]))
    return loss, hits


def cloze_loss(net: Network, both: torch.Tensor, target: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Block diffusion loss of plain text: the noisy copy sees the clean blocks before it and itself."""
    B, T = target.shape
    block = torch.arange(T) // BLOCK
    block = torch.cat((block, block))
    clean = torch.arange(2 * T) < T
    instance = torch.where(clean, block, block + T)
    mask = additive(segment_visibility(block, instance, clean), DTYPE)
    rope = rope_table(torch.arange(2 * T)[None] % T, net.shape.head_dim, net.shape.rope_theta)
    rope = tuple(r.expand(B, -1, -1, -1) for r in rope)
    hidden = net.hidden(both, Layout(2 * T, 0, 0, rope, mask, None, DTYPE))[:, T:].reshape(B * T, -1)
    asked = (target.view(-1) != IGNORE).nonzero().squeeze(1)
    return F.cross_entropy(net.logits(hidden[asked], DTYPE), target.view(-1)[asked])


class Trainer:
    """Network, optimizer and curriculum position, with their file."""

    def __init__(self, args: argparse.Namespace, rank: int):
        self.args, self.rank = args, rank
        self.folder = HERE / "runs" / args.name
        self.folder.mkdir(parents=True, exist_ok=True)
        self.tokenizer = load(HERE / "checkpoint")
        shape = Shape(
            vocab_size=self.tokenizer.get_vocab_size(),
            num_attention_heads=args.heads,
            num_key_value_heads=args.kv_heads,
            num_hidden_layers=args.layers,
            hidden_size=args.hidden,
            intermediate_size=2 * args.hidden,
        )
        self.net = Network(shape, gain=args.gain, mimetic=args.mimetic, seed=args.seed)
        if args.circuit:
            install(self.net, self.tokenizer)
        gains = [p for n, p in self.net.named_parameters() if p.ndim == 1]
        rest = [p for n, p in self.net.named_parameters() if p.ndim > 1]
        groups = [{"params": rest, "weight_decay": 0.02}, {"params": gains, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), fused=True)
        self.step, self.stage, self.since, self.seconds = 0, 0, 0, 0.0
        self.state_file = self.folder / "state.pt"
        if self.state_file.exists():
            state = torch.load(self.state_file, weights_only=True)
            self.net.load_state_dict(state["net"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.step, self.stage, self.since = state["step"], state["stage"], state["since"]
            self.seconds = state["seconds"]

    def save(self) -> None:
        """Write the state; the shape goes with it so that the export needs no arguments."""
        state = {
            "net": self.net.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "stage": self.stage,
            "since": self.since,
            "seconds": self.seconds,
            "shape": self.net.shape.dict(),
        }
        torch.save(state, self.state_file.with_suffix(".tmp"))
        self.state_file.with_suffix(".tmp").replace(self.state_file)

    def rate(self, ends_in: float) -> float:
        """Learning rate: warm-up, constant, and a linear decay over the last minutes of a final segment."""
        rate = self.args.lr * min(1.0, (self.step + 1) / 100)
        if self.args.decay_minutes:
            rate *= max(0.02, min(1.0, ends_in / (60 * self.args.decay_minutes)))
        return rate

    def agree(self, ends_in: float) -> float:
        """Rank 0 decides on the stage and on the time left, so that all ranks do the same."""
        if (self.folder / "stop").exists():  # the polite way to end a run: touch this file
            ends_in = -1.0
        decided = torch.tensor([self.stage, self.since, ends_in], dtype=torch.float64)
        dist.broadcast(decided, 0)
        self.stage, self.since = int(decided[0]), int(decided[1])
        return float(decided[2])

    def average_gradients(self) -> None:
        """Mean of all ranks' gradients, in one message."""
        grads = [p.grad for p in self.net.parameters()]
        flat = torch.cat([g.flatten() for g in grads])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        for grad, mean in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
            grad.copy_(mean.view_as(grad))

    def run(self) -> None:
        """Train until the time is over."""
        begin, table = time.time(), stages(self.args.schedule)
        recent: dict[str, list[float]] = {}
        losses: list[float] = []
        while (ends_in := self.agree(begin + 60 * self.args.minutes - time.time())) > 0:
            started = time.time()
            rng = random.Random(f"train {self.args.seed} {self.step} {self.rank}")
            same = random.Random(f"recipe {self.args.seed} {self.step}")
            matrices, gains = self.optimizer.param_groups
            matrices["lr"] = self.rate(ends_in)
            gains["lr"] = GAIN_RATE * matrices["lr"]  # they alone set how sharp attention can get
            loss, hits = question_loss(self.net, make_batch(rng, self.tokenizer, stage_recipe(same, table, self.stage)))
            loss.backward()
            if self.step % 2 == 0:
                cloze = cloze_loss(self.net, *make_cloze(rng, self.tokenizer, 256, 4))
                (self.args.cloze * cloze).backward()
                recent["cloze"] = [*recent.get("cloze", [])[-9:], cloze.item()]
            self.average_gradients()
            torch.nn.utils.clip_grad_norm_(self.net.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            self.step, self.since = self.step + 1, self.since + 1
            self.seconds += time.time() - started
            losses.append(loss.item())
            for task, marks in hits.items():
                recent.setdefault(task, []).extend(marks)
            if self.rank == 0 and self.step % 20 == 0:
                self.report(losses, recent, table)
            if self.rank == 0 and self.step % 100 == 0:
                self.save()
        if self.rank == 0:
            self.save()

    def report(self, losses: list[float], recent: dict[str, list[float]], table: list[Recipe]) -> None:
        """One log line; then the stage advances if its accuracy is reached."""
        parts = {task: round(sum(v[-400:]) / len(v[-400:]), 3) for task, v in sorted(recent.items())}
        line = {"step": self.step, "stage": self.stage, "length": table[self.stage].length, "min": self.seconds / 60}
        line |= {"loss": sum(losses[-20:]) / len(losses[-20:]), **parts}
        text = json.dumps({k: round(v, 3) if isinstance(v, float) else v for k, v in line.items()})
        print(text, flush=True)
        with open(self.folder / "progress.jsonl", "a") as out:
            out.write(text + "\n")
        for marks in recent.values():
            del marks[:-400]
        if not math.isfinite(line["loss"]):
            raise RuntimeError("the loss is not finite")
        # the measure covers the whole mixture, so shorter documents of earlier stages count too
        learned = parts.get("multi_key", 0) > self.args.advance and self.since >= 60
        if learned and self.stage + 1 < len(table):
            self.stage, self.since = self.stage + 1, 0
            recent.clear()


def work(rank: int, args: argparse.Namespace, store: str) -> None:
    """One rank: its own core and its own documents; gradients are averaged every step."""
    torch.set_num_threads(args.threads)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=args.ranks)
    network.compile_pieces()
    Trainer(args, rank).run()
    dist.destroy_process_group()


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--name", default="main")
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--threads", type=int, default=1, help="per rank")
    parser.add_argument("--ranks", type=int, default=2, help="data-parallel processes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--gain", type=float, default=1.2)
    parser.add_argument("--mimetic", type=float, default=0.0)
    parser.add_argument("--circuit", type=int, default=1, help="1: structured initialisation")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--cloze", type=float, default=0.5)
    parser.add_argument("--advance", type=float, default=0.9)
    parser.add_argument("--schedule", default="main")
    parser.add_argument("--decay-minutes", type=float, default=0)
    args = parser.parse_args()
    store = HERE / "runs" / args.name / "store"
    store.parent.mkdir(parents=True, exist_ok=True)
    store.unlink(missing_ok=True)
    mp.spawn(work, (args, str(store)), nprocs=args.ranks)


if __name__ == "__main__":
    main()
