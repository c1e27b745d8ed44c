"""The specification of LLaDA2.0/2.1, written from its description: explicit loops over tokens, heads and experts.

Shares no code with the runtime: plain float64 torch on the checkpoint's tensors.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor


def rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * weight


def turned(x: Tensor, position: int, raw: dict[str, Any]) -> Tensor:
    """One head's vector [D] at a position: the first channels in pairs (i, i + half), the others untouched."""
    size = int(raw["head_dim"] * raw["partial_rotary_factor"])
    half, out = size // 2, x.clone()
    for i in range(half):
        angle = position / raw["rope_theta"] ** (2 * i / size)
        out[i] = x[i] * math.cos(angle) - x[i + half] * math.sin(angle)
        out[i + half] = x[i + half] * math.cos(angle) + x[i] * math.sin(angle)
    return out


def attention(x: Tensor, w: dict[str, Tensor], raw: dict[str, Any], block: int) -> Tensor:
    heads, kv, dim, eps = (raw[k] for k in ("num_attention_heads", "num_key_value_heads", "head_dim", "rms_norm_eps"))
    mixed = x @ w["attention.query_key_value.weight"].T
    q, k, v = mixed[:, : heads * dim], mixed[:, heads * dim : (heads + kv) * dim], mixed[:, (heads + kv) * dim :]
    out = torch.zeros(len(x), heads * dim, dtype=x.dtype)
    for h in range(heads):
        own = slice(h * dim, (h + 1) * dim)
        shared = slice(h // (heads // kv) * dim, (h // (heads // kv) + 1) * dim)
        qs = [turned(rms(q[t, own], w["attention.query_layernorm.weight"], eps), t, raw) for t in range(len(x))]
        ks = [turned(rms(k[t, shared], w["attention.key_layernorm.weight"], eps), t, raw) for t in range(len(x))]
        for t in range(len(x)):
            seen = [s for s in range(len(x)) if s // block <= t // block]
            scores = torch.stack([qs[t] @ ks[s] for s in seen]) / math.sqrt(dim)
            out[t, own] = scores.softmax(0) @ v[seen, shared]
    return out @ w["attention.dense.weight"].T


def gated(x: Tensor, w: dict[str, Tensor], name: str) -> Tensor:
    gate, up = w[f"{name}.gate_proj.weight"] @ x, w[f"{name}.up_proj.weight"] @ x
    return w[f"{name}.down_proj.weight"] @ (gate / (1 + torch.exp(-gate)) * up)


def chosen(x: Tensor, w: dict[str, Tensor], raw: dict[str, Any]) -> dict[int, float]:
    """Expert -> weight of one token: bias and groups decide who, the plain sigmoid how much."""
    score = 1 / (1 + torch.exp(-(w["mlp.gate.weight"] @ x)))
    wish = (score + w["mlp.gate.expert_bias"]).tolist()
    size = raw["num_experts"] // raw["n_group"]
    groups = [list(range(g * size, (g + 1) * size)) for g in range(raw["n_group"])]
    worth = [sum(sorted((wish[e] for e in group), reverse=True)[:2]) for group in groups]
    kept = sorted(range(len(groups)), key=lambda g: -worth[g])[: raw["topk_group"]]
    best = sorted((e for g in kept for e in groups[g]), key=lambda e: -wish[e])[: raw["num_experts_per_tok"]]
    total = sum(float(score[e]) for e in best) + 1e-20 if raw["norm_topk_prob"] else 1.0
    return {e: float(score[e]) / total * raw["routed_scaling_factor"] for e in best}


def feed_forward(x: Tensor, w: dict[str, Tensor], raw: dict[str, Any], layer: int) -> Tensor:
    rows = []
    for row in x:
        if layer < raw["first_k_dense_replace"]:
            rows.append(gated(row, w, "mlp"))
            continue
        total = gated(row, w, "mlp.shared_experts") if raw["num_shared_experts"] else torch.zeros_like(row)
        for e, weight in chosen(row, w, raw).items():
            total = total + weight * gated(row, w, f"mlp.experts.{e}")
        rows.append(total)
    return torch.stack(rows)


def llada2_logits(folder: Path, tokens: Tensor, block: int) -> Tensor:
    """Logits [T, V] under the block-causal mask."""
    raw = json.loads((folder / "config.json").read_text())
    everything = {n: t.double() for file in folder.glob("*.safetensors") for n, t in load_file(file).items()}
    eps = raw["rms_norm_eps"]
    x = everything["model.word_embeddings.weight"][tokens]
    for layer in range(raw["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        w = {n.removeprefix(prefix): t for n, t in everything.items() if n.startswith(prefix)}
        x = x + attention(rms(x, w["input_layernorm.weight"], eps), w, raw, block)
        x = x + feed_forward(rms(x, w["post_attention_layernorm.weight"], eps), w, raw, layer)
    head = everything.get("lm_head.weight", everything["model.word_embeddings.weight"])
    return rms(x, everything["model.norm.weight"], eps) @ head.T
