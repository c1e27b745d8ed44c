"""The specification of generation: one request, no cache, no pages, no batch; the whole sequence again at every step.

Written without the runtime's scheduler, runner, backends or decoding code; only the network itself is shared (its
parity with an independent implementation is a test of its own).
"""

from __future__ import annotations

import math
from itertools import accumulate

import torch
from torch import Tensor

from losa_runtime.models.model import BlockDiffusionModel


def forward(model: BlockDiffusionModel, tokens: list[int]) -> Tensor:
    """Logits [N, V] of every position under the block-causal mask."""
    n, b = len(tokens), model.config.block_length
    block = torch.arange(n) // b
    visible = block[None, :] <= block[:, None]

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        group = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        scores = torch.einsum("thd,shd->hts", q, k) / q.shape[-1] ** 0.5
        return torch.einsum("hts,shd->thd", scores.masked_fill(~visible, -torch.inf).softmax(-1), v)

    with torch.inference_mode():
        return model.logits(model(torch.tensor(tokens), torch.arange(n), attend))


def generate(
    model: BlockDiffusionModel,
    prompt: list[int],
    max_new_tokens: int,
    steps: int,
    rule: str = "low_confidence_dynamic",
    threshold: float = 0.9,
    vocab_size: int | None = None,
    stop: tuple[int, ...] = (),
    seen_logits: list[Tensor] | None = None,
    sub_block: int | None = None,
) -> list[int]:
    """Greedy block diffusion; returns the output tokens up to and including the first stop token. threshold: of the
    dynamic rule, or the bound of the entropy-bounded one. sub_block: positions that are filled before the next ones,
    each time by the rule for a block of so many, in its share of the steps; seen_logits then has their rows only.

    Of a model with shifted logits, row i - 1 speaks for position i, and a block's first position is filled before any
    step by the last row of the whole blocks before it.
    """
    b, mask, shift = model.config.block_length, model.config.mask_token_id, int(model.shifted_logits)
    end = len(prompt) + max_new_tokens
    x = list(prompt)
    while len(x) < end:
        start = len(x) - len(x) % b
        if shift and len(x) == start:
            logits = forward(model, x)[-1].clone()
            if seen_logits is not None:
                seen_logits.append(logits[None].clone())
            logits[mask] = logits[vocab_size or logits.shape[0] :] = -torch.inf
            x.append(int(logits.argmax()))
        x += [mask] * (start + b - len(x))
        size = sub_block or b
        shares = [steps // (b // size) + (j < steps % (b // size)) for j in range(b // size)]
        for part, step in [(j, s) for j, share in enumerate(shares) for s in range(share)]:
            open_ = [i for i in range(start + part * size, min(start + part * size + size, end)) if x[i] == mask]
            if not open_:
                continue
            if _stops(x[len(prompt) : end], stop, mask) is not None:
                break
            logits = forward(model, x)[[i - shift for i in open_]]
            if seen_logits is not None:
                seen_logits.append(logits)
            logits[:, mask] = logits[:, vocab_size or logits.shape[1] :] = -torch.inf
            best = logits.argmax(-1)
            sure = logits.softmax(-1)[torch.arange(len(open_)), best]
            n = min(len(open_), size // shares[part] + (step < size % shares[part]))
            n = len(open_) if step == shares[part] - 1 else n
            order = sorted(range(len(open_)), key=lambda i: (-float(sure[i]), i))
            if rule == "sequential":
                order = list(range(len(open_)))
            p = logits.double().softmax(-1)
            if rule == "margin":
                first, second = p.topk(2).values.T
                order = sorted(range(len(open_)), key=lambda i: (-float(first[i] - second[i]), i))
            if rule == "entropy_bounded":
                entropy = [-sum(x * math.log(x) for x in row if x > 0) for row in p.tolist()]
                order = sorted(range(len(open_)), key=lambda i: (entropy[i], i))
                n = max(n, sum(total <= threshold for total in accumulate(entropy[i] for i in order)))
            chosen = order[:n]
            above = [i for i in range(len(open_)) if sure[i] > threshold]
            if rule == "low_confidence_dynamic" and len(above) >= n:
                chosen = above
            for i in chosen:
                x[open_[i]] = int(best[i])
        found = _stops(x[len(prompt) : end], stop, mask)
        if found is not None:
            return x[len(prompt) : len(prompt) + found + 1]
    return x[len(prompt) : end]


def generate_with_edits(
    model: BlockDiffusionModel,
    prompt: list[int],
    max_new_tokens: int,
    rule: tuple[float, float, int, float],
    vocab_size: int,
    stop: tuple[int, ...] = (),
) -> tuple[list[int], int]:
    """The same with joint_threshold; also how many tokens were replaced. rule: threshold, edit_threshold,
    post_edit_steps, neighbour_penalty. What comes with the block before (shifted logits) is neither penalised nor
    replaced."""
    b, mask, shift = model.config.block_length, model.config.mask_token_id, int(model.shifted_logits)
    threshold, edit_threshold, most, penalty = rule
    end, x, edits = len(prompt) + max_new_tokens, list(prompt), 0
    while len(x) < end:
        start = len(x) - len(x) % b
        if shift and len(x) == start:
            logits = forward(model, x)[-1].clone()
            logits[mask] = logits[vocab_size:] = -torch.inf
            x.append(int(logits.argmax()))
        mine = range(len(x), min(start + b, end))
        x += [mask] * (start + b - len(x))
        posts = 0
        while mine:
            began = all(x[i] != mask for i in mine)
            logits = forward(model, x)[[i - shift for i in mine]]
            for row, i in enumerate(mine):
                if i > start and x[i - 1] != mask:
                    logits[row, x[i - 1]] -= penalty
            logits[:, mask] = logits[:, vocab_size:] = -torch.inf
            best = dict(zip(mine, logits.argmax(-1).tolist(), strict=True))
            sure = {i: float(logits[row].softmax(-1)[best[i]]) for row, i in enumerate(mine)}
            masks = [i for i in mine if x[i] == mask]
            fills = [i for i in masks if sure[i] > threshold] or sorted(masks, key=lambda i: (-sure[i], i))[:1]
            changed = [i for i in mine if x[i] != mask and x[i] != best[i] and sure[i] > edit_threshold]
            for i in (*fills, *changed):
                x[i] = best[i]
            edits += len(changed)
            posts += began
            if all(x[i] != mask for i in mine) and ((began and not changed) or posts >= most):
                break
        found = _stops(x[len(prompt) : end], stop, mask)
        if found is not None:
            return x[len(prompt) : len(prompt) + found + 1], edits
    return x[len(prompt) : end], edits


def _stops(output: list[int], stop: tuple[int, ...], mask: int) -> int | None:
    for i, token in enumerate(output):
        if token == mask:
            return None
        if token in stop:
            return i
    return None
