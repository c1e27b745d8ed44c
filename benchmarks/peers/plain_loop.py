"""The baseline that a user has without a runtime: transformers' Qwen3 and a block-diffusion loop around it.

Exact K/V: whole blocks of the prompt are prefilled (block-causally, in chunks, which costs half of what one forward
over the whole mask does), a block's steps attend to the cached prefix and drop their own K/V, and a finished block is
stored by one more forward. Attention is torch's SDPA, without a mask wherever there is no padding, so that it takes its
fast path. What it does again where a runtime would not: `DynamicCache` copies the cached K/V at every step (it appends
by concatenation, as the public loops do); every prompt's prefill, unless `Reusing`; in a padded batch rows wait for the
slowest block, and keys are repeated for the query heads, as SDPA with a mask wants them.
Written without the runtime's code. N prompts, B block length, L cached tokens, V vocabulary.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.peers.peer import Answer, Peer, Prompt, Task, common_prefix, visible
from benchmarks.peers.workload import Facts

PREFILL_CHUNK = 1024  # tokens, in whole blocks


def load_transformers(folder: Path) -> Any:
    """transformers' Qwen3ForCausalLM, float32, SDPA, with the checkpoint's weights."""
    for noisy in ("torchao", "torch.utils._pytree"):  # transformers loads what it can find, with warnings about GPUs
        logging.getLogger(noisy).setLevel(logging.ERROR)
    from transformers import Qwen3Config, Qwen3ForCausalLM

    raw = json.loads((folder / "config.json").read_text())
    fields = {k: v for k, v in raw.items() if k not in ("architectures", "model_type", "dtype", "torch_dtype")}
    config = Qwen3Config(**fields)
    config._attn_implementation = "sdpa"
    model = Qwen3ForCausalLM(config).eval().float().requires_grad_(False)
    tensors = {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}
    missing, unexpected = model.load_state_dict({k: v.float() for k, v in tensors.items()}, strict=False)
    if unexpected or set(missing) - {"lm_head.weight"} or (missing and not config.tie_word_embeddings):
        raise ValueError(f"{folder}: not the tensors of a Qwen3 model: missing {missing}, unexpected {unexpected}")
    for layer in model.model.layers:
        layer.self_attn.is_causal = False  # no mask then means none: a block sees all of itself
    return model


class OneByOne(Peer):
    """One prompt after another, each from nothing."""

    name = "transformers_b1"
    alone = True

    def __init__(self, model: Any, facts: Facts) -> None:
        self.model, self.facts = model, facts

    @torch.inference_mode()
    def answer(self, prompts: Sequence[Prompt], task: Task) -> list[Answer]:
        return [visible(self._one(prompt, task), task) for prompt in prompts]

    def _one(self, prompt: Prompt, task: Task) -> list[int]:
        cache = self._cache(prompt)
        _prefill(self.model, cache, prompt, self.facts.block_length)
        return _denoise(self.model, cache, [prompt], task, self.facts)[0]

    def _cache(self, prompt: Prompt) -> Any:
        return _new_cache()


class Reusing(OneByOne):
    """The same with the one trick at hand: the cache of the prompt before is cut to the whole blocks in common."""

    name = "transformers_b1_reusing"
    alone = False

    def __init__(self, model: Any, facts: Facts) -> None:
        super().__init__(model, facts)
        self.reset()

    def reset(self) -> None:
        self._kept, self._tokens = _new_cache(), ()

    def _cache(self, prompt: Prompt) -> Any:
        same = common_prefix(prompt, self._tokens)
        same -= same % self.facts.block_length
        cached = self._kept.get_seq_length()
        if cached > same:
            self._kept.crop(same - cached)
        self._tokens = prompt
        return self._kept


class Batched(Peer):
    """All prompts in one batch, padded on the left by whole blocks; each is prefilled alone, so padding costs nothing
    there. Rows keep their pace: a block begins when all rows have finished the one before."""

    name = "transformers_batched"

    def __init__(self, model: Any, facts: Facts) -> None:
        self.model, self.facts = model, facts

    @torch.inference_mode()
    def answer(self, prompts: Sequence[Prompt], task: Task) -> list[Answer]:
        caches = []
        for prompt in prompts:
            caches.append(_new_cache())
            _prefill(self.model, caches[-1], prompt, self.facts.block_length)
        outputs = _denoise(self.model, _stacked(caches), prompts, task, self.facts)
        return [visible(output, task) for output in outputs]


def _new_cache() -> Any:
    from transformers import DynamicCache

    return DynamicCache()


def _prefill(model: Any, cache: Any, prompt: Prompt, block: int) -> None:
    """Store the whole blocks of a prompt that the cache lacks."""
    end = len(prompt) - len(prompt) % block
    size = PREFILL_CHUNK - PREFILL_CHUNK % block
    for start in range(cache.get_seq_length(), end, size):
        stop = min(start + size, end)
        number = torch.arange(stop) // block
        sees = number[start:, None] >= number[None, :]
        positions = torch.arange(start, stop)[None]
        _forward(model, cache, torch.tensor([prompt[start:stop]]), positions, sees[None, None])


def _stacked(caches: list[Any]) -> Any:
    """One cache of all rows, padded on the left. The single ones are emptied on the way."""
    most = max(cache.get_seq_length() for cache in caches)
    stacked = _new_cache()
    for index in range(len(caches[0].layers)):
        layers = [cache.layers[index] for cache in caches]
        keys, values = (
            torch.cat([torch.nn.functional.pad(x, (0, 0, most - x.shape[2], 0)) for x in side])
            for side in ([layer.keys for layer in layers], [layer.values for layer in layers])
        )
        for layer in layers:
            layer.keys = layer.values = None
        stacked.update(keys, values, index)
    return stacked


def _denoise(model: Any, cache: Any, prompts: Sequence[Prompt], task: Task, facts: Facts) -> list[list[int]]:
    """Block after block for all rows, whose cached tokens end at the same column. Returns the outputs."""
    block, mask = facts.block_length, facts.mask_token_id
    stored = torch.tensor([len(prompt) - len(prompt) % block for prompt in prompts])
    pad_N1 = cache.get_seq_length() - stored[:, None]
    rows = [list(prompt) for prompt in prompts]
    ends = [len(prompt) + task.max_new_tokens for prompt in prompts]
    while True:
        cur_NB = torch.full((len(rows), block), mask)
        free_NB = torch.zeros(len(rows), block, dtype=torch.bool)
        for n, (row, start) in enumerate(zip(rows, stored.tolist(), strict=True)):
            known = row[start : start + block]
            cur_NB[n, : len(known)] = torch.tensor(known, dtype=torch.int64)
            live = not _over(row, len(prompts[n]), ends[n], task)
            free_NB[n, len(known) : max(0, ends[n] - start)] = live
        if not free_NB.any():
            return [row[len(prompt) : end] for row, prompt, end in zip(rows, prompts, ends, strict=True)]
        positions_NB = stored[:, None] + torch.arange(block)
        sees = _no_padding(pad_N1, cache.get_seq_length() + block, block)
        for step in range(task.steps):
            left_NB = free_NB & (cur_NB == mask)
            if not left_NB.any():
                break
            hidden_NBC = _forward(model, cache, cur_NB, positions_NB, sees)
            cache.crop(-block)
            logits_NBV = model.lm_head(hidden_NBC)
            _unmask(cur_NB, left_NB, logits_NBV, step, task, facts)
        for n, (row, start) in enumerate(zip(rows, stored.tolist(), strict=True)):
            taken = free_NB[n]
            if taken.any():
                row[start:] = cur_NB[n, : min(block, ends[n] - start)].tolist()
        stored += block
        if all(_over(row, len(p), end, task) for row, p, end in zip(rows, prompts, ends, strict=True)):
            continue  # the last blocks are read by nobody
        _forward(model, cache, cur_NB, positions_NB, sees)


def _over(row: list[int], prompt: int, end: int, task: Task) -> bool:
    stopped = not task.ignore_stops and any(token in task.stop_ids for token in row[prompt:])
    return len(row) >= end or stopped


def _no_padding(pad_N1: Tensor, length: int, block: int) -> Tensor | None:
    """Which columns the rows may read, bool [N, 1, B, L + B]; None = all."""
    if not pad_N1.any():
        return None
    return (torch.arange(length)[None] >= pad_N1)[:, None, None].expand(-1, 1, block, -1)


def _unmask(cur_NB: Tensor, left_NB: Tensor, logits_NBV: Tensor, step: int, task: Task, facts: Facts) -> None:
    """Accept tokens in place: all above the threshold, at least the step's share of the plan, the surest first."""
    block = facts.block_length
    logits_NBV[..., facts.vocab_size :] = -torch.inf
    banned = [facts.mask_token_id, *(sorted(task.stop_ids) if task.ignore_stops else [])]
    logits_NBV[..., banned] = -torch.inf
    best_NB = logits_NBV.argmax(-1)
    sure_NB = logits_NBV.softmax(-1).gather(-1, best_NB[..., None])[..., 0]
    planned = block if step == task.steps - 1 else block // task.steps + (step < block % task.steps)
    for n in left_NB.any(-1).nonzero().flatten().tolist():
        sure_B = sure_NB[n].masked_fill(~left_NB[n], -1.0)
        chosen = sure_B > task.threshold
        least = min(planned, int(left_NB[n].sum()))
        if int(chosen.sum()) < least:
            chosen = torch.zeros_like(chosen)
            chosen[sure_B.sort(descending=True, stable=True).indices[:least]] = True
        cur_NB[n, chosen] = best_NB[n, chosen]


def _forward(model: Any, cache: Any, tokens: Tensor, positions: Tensor, sees: Tensor | None) -> Tensor:
    """Hidden states of the tokens; their K/V are appended to the cache."""
    found = model.model(
        input_ids=tokens,
        attention_mask={"full_attention": sees},
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
    )
    hidden: Tensor = found.last_hidden_state
    return hidden
