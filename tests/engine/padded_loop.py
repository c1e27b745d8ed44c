"""A2D's published way to generate, by transformers: the prompt padded on the left to whole blocks, an explicit mask.

Pads are seen by nobody and have no positions; all else is the whole sequence again at every step, greedy, a planned
number of the surest masks per step. Nothing of the runtime is used.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor


class PaddedLoop:
    """One checkpoint. mask: its mask id; size: ids below it may be chosen."""

    def __init__(self, folder: Path, block: int, mask: int, size: int) -> None:
        import transformers

        raw = json.loads((folder / "config.json").read_text())
        theta = raw.pop("rope_theta")
        raw = {k: v for k, v in raw.items() if k not in ("model_type", "dtype", "torch_dtype", "architectures")}
        raw.pop("rope_scaling", None)
        config = transformers.Qwen3Config(**raw, rope_parameters={"rope_type": "default", "rope_theta": theta})
        config._attn_implementation = "eager"
        self.model: Any = transformers.Qwen3ForCausalLM(config).eval().float()
        tensors = {n: t.float() for file in sorted(folder.glob("*.safetensors")) for n, t in load_file(file).items()}
        missing, unexpected = self.model.load_state_dict(tensors, strict=False)
        assert not unexpected and set(missing) <= {"lm_head.weight"}
        self.block, self.mask, self.size = block, mask, size

    def logits(self, pads: int, tokens: list[int]) -> Tensor:
        """[N, V] of the tokens behind so many pads, which are whole blocks together."""
        length = pads + len(tokens)
        assert length % self.block == 0
        number = torch.arange(length) // self.block
        visible = (number[:, None] >= number[None, :]) & (torch.arange(length) >= pads)
        visible |= torch.eye(length, dtype=torch.bool)  # a pad has to see something
        additive = torch.zeros(length, length).masked_fill(~visible, float("-inf"))
        with torch.no_grad():
            out = self.model(
                input_ids=torch.tensor([[self.mask] * pads + tokens]),
                attention_mask=additive[None, None],
                position_ids=(torch.arange(length) - pads).clamp(min=0)[None],
                use_cache=False,
            )
        found: Tensor = out.logits[0, pads:].double()
        found[:, self.mask] = found[:, self.size :] = -torch.inf
        return found

    def generate(self, prompt: list[int], new: int, steps: int, stop: tuple[int, ...]) -> list[int]:
        """Output tokens, up to and with the first of `stop`."""
        pads = -len(prompt) % self.block
        known, end = list(prompt), len(prompt) + new
        while len(known) < end:
            start = len(known)
            known += [self.mask] * self.block
            for step in range(steps):
                open_ = [i for i in range(start, min(start + self.block, end)) if known[i] == self.mask]
                if not open_:
                    break
                rows = self.logits(pads, known)[open_]
                sure, best = rows.softmax(-1).max(-1)
                n = self.block // steps + (step < self.block % steps) if step < steps - 1 else len(open_)
                for i in sorted(range(len(open_)), key=lambda i: (-float(sure[i]), i))[:n]:
                    known[open_[i]] = int(best[i])
            found = next((i for i in range(start, min(start + self.block, end)) if known[i] in stop), None)
            if found is not None:
                return known[len(prompt) : found + 1]
        return known[len(prompt) : end]

    def scores(self, prompt: list[int]) -> list[float]:
        """Of each token, given earlier blocks and what stands before it in its own."""
        pads, found = -len(prompt) % self.block, []
        for i, token in enumerate(prompt):
            masks = -(pads + i) % self.block or self.block
            rows = self.logits(pads, prompt[:i] + [self.mask] * masks)
            found.append(float(rows[i].log_softmax(-1)[token]))
        return found
