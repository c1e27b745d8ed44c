"""The written definitions of sampling and of the three algorithms once more, in plain Python floats and loops.

Written from the definitions, not from the code: no tensor, no sharing of anything with `losa_runtime.decoding`.
"""

from __future__ import annotations

import math


def distribution(logits: list[float], temperature: float, banned: set[int]) -> list[float]:
    """p over the vocabulary: banned ids 0, tempered (temperature 0: as at 1), unfiltered."""
    t = temperature if temperature > 0 else 1.0
    best = max(x for i, x in enumerate(logits) if i not in banned)
    weights = [0.0 if i in banned else math.exp((x - best) / t) for i, x in enumerate(logits)]
    total = math.fsum(weights)
    return [w / total for w in weights]


def kept_ids(logits: list[float], p: list[float], banned: set[int], top_k: int, top_p: float, min_p: float) -> set[int]:
    order = sorted((i for i in range(len(p)) if i not in banned), key=lambda i: (-logits[i], i))
    if top_k > 0:
        order = order[:top_k]
    if top_p < 1:
        mass, cumulative, nucleus = math.fsum(p[i] for i in order), 0.0, []
        for i in order:
            if cumulative >= top_p * mass:
                break
            nucleus.append(i)
            cumulative += p[i]
        order = nucleus
    return {i for i in order if p[i] >= min_p * p[order[0]]}


def draw(p: list[float], kept: set[int], u: float) -> int:
    target, cumulative = u * math.fsum(p[i] for i in kept), 0.0
    for i in sorted(kept):
        cumulative += p[i]
        if cumulative > target:
            return i
    return max(kept)


def greedy(logits: list[float], banned: set[int]) -> int:
    return min((i for i in range(len(logits)) if i not in banned), key=lambda i: (-logits[i], i))


def accepted_offsets(
    algorithm: str,
    candidates: list[tuple[int, float]],  # (offset, confidence)
    step: int,
    num_steps: int,
    block_length: int,
    threshold: float,
    bound: float = 0.0,
    entropies: dict[int, float] | None = None,
    margins: dict[int, float] | None = None,
    lots: dict[int, float] | None = None,
) -> set[int]:
    """The offsets that a block accepts in one step. entropies, margins, lots: by offset, where a rule reads them."""
    n = block_length // num_steps
    if step < block_length % num_steps:
        n += 1
    if step + 1 >= num_steps:
        n = len(candidates)
    n = min(n, len(candidates))
    if algorithm == "sequential":
        return set(sorted(offset for offset, _ in candidates)[:n])
    if algorithm == "random":
        assert lots is not None
        return set(sorted(lots, key=lambda o: (-lots[o], o))[:n])
    if algorithm == "margin":
        assert margins is not None
        return set(sorted(margins, key=lambda o: (-margins[o], o))[:n])
    if algorithm == "entropy_bounded":
        assert entropies is not None
        order = sorted(entropies, key=lambda o: (entropies[o], o))
        within, total = 0, 0.0
        for offset in order:
            total += entropies[offset]
            if total > bound:
                break
            within += 1
        return set(order[: max(within, n)])
    if algorithm == "joint_threshold":  # of masks alone
        sure = {offset for offset, confidence in candidates if confidence > threshold}
        return sure or set(sorted((o for o, _ in candidates), key=lambda o: (-dict(candidates)[o], o))[:1])
    surest = [offset for offset, _ in sorted(candidates, key=lambda c: (-c[1], c[0]))]
    if algorithm == "low_confidence_dynamic":
        sure = {offset for offset, confidence in candidates if confidence > threshold}
        if len(sure) >= n:
            return sure
    return set(surest[:n])
