"""Made-up keys and queries for the attention benchmark, with the two properties that its figures hang on.

How many pages of one row are also those of the other rows of its block (figure 3 of arXiv 2604.12056), and how far the
query heads of a KV group agree. Both are correlations of Gaussian vectors: rows share a part of their query, and so do
grouped heads. Knows no method and no backend.
N positions, G KV heads, H query heads, D head dim, R rows of a block, T denoising steps, P pages.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from losa_kernels.reference.selection import page_scores, share_scores, top_pages

# Share of the union of all 16 rows that the 1, 2, ... most active rows select together, read off the figure.
FIGURE_3 = (0.47, 0.55, 0.59, 0.64, 0.69, 0.71, 0.72, 0.74, 0.75, 0.78, 0.81, 0.86, 0.92, 0.94, 0.94, 1.0)
LOUDNESS = 2.0  # of queries: a softmax with peaks, as trained models have
DRIFT = 1e-4  # change of a stable row's query between steps, relative to its length
LOUDER = 1.6  # a row that is drawn anew is up to so many times as loud or soft: it changes, whatever it selects
ALIKE = 0.999  # correlation of the first row: it is drawn anew like the others
FIT_SEEDS, FIT_GROUPS = 4, 2  # blocks and KV heads over which a fit is averaged


class Sizes(NamedTuple):
    """What queries are made for."""

    rows: int
    heads: int
    kv_heads: int
    dim: int


class Locality(NamedTuple):
    """rows: correlation of each row's query with what all rows share, the most active row first; 1 = selects the same
    pages, 0 = its own. heads: correlation of the query heads of a KV group.
    """

    rows: tuple[float, ...]
    heads: float


class Choice(NamedTuple):
    """How rows select: their `best` pages by the bounds of the keys, [P, G, 2, D]."""

    bounds_PG2D: Tensor
    best: int

    def pages(self, q_RHD: Tensor) -> Tensor:
        """Selected pages, bool [R, G, P]."""
        device = self.bounds_PG2D.device
        scores = share_scores(page_scores(q_RHD.to(device), self.bounds_PG2D), self.bounds_PG2D.shape[1])
        best = torch.full((q_RHD.shape[0],), min(self.best, self.bounds_PG2D.shape[0]), device=device)
        return top_pages(scores, best)

    def growth_GR(self, q_RHD: Tensor) -> Tensor:
        """Pages in the union of the first 1, 2, ... R rows, per KV head."""
        return self.pages(q_RHD).cummax(0).values.sum(-1).T


def keys(count: int, kv_heads: int, dim: int, span: int, generator: torch.Generator) -> Tensor:
    """Keys [count, G, D] that resemble their neighbours: half of their variance is common to `span` positions."""
    device = generator.device
    topics = torch.randn(-(-count // span), kv_heads, dim, generator=generator, device=device)
    own = torch.randn(count, kv_heads, dim, generator=generator, device=device)
    return own.add_(topics.repeat_interleave(span, dim=0)[:count]).mul_(0.5**0.5)


def opening(sizes: Sizes, locality: Locality, seed: int) -> Tensor:
    """Queries of a block's first step, the most active row first: [R, H, D]."""
    rng = torch.Generator().manual_seed(seed)
    common, own = _draw(sizes, locality.heads, rng)
    return _mix(common, own, locality.rows)


def queries(steps: int, active: int, sizes: Sizes, locality: Locality, seed: int) -> Tensor:
    """Queries of a block's steps, [T, R, H, D]: in each step `active` random rows are drawn anew, the others drift."""
    rng = torch.Generator().manual_seed(seed)
    common, own = _draw(sizes, locality.heads, rng)
    now = _mix(common, own, locality.rows)[torch.randperm(sizes.rows, generator=rng)]
    made = [now]
    for _ in range(1, steps):
        fresh = _mix(common, _heads(sizes, locality.heads, rng, active), locality.rows[:active])
        loudness = LOUDER ** (2.0 * torch.rand(active, 1, 1, generator=rng) - 1.0)
        now = now + DRIFT * torch.randn(now.shape, generator=rng)
        now[torch.randperm(sizes.rows, generator=rng)[:active]] = loudness * fresh
        made.append(now)
    return LOUDNESS * torch.stack(made)


def like_figure_3(sizes: Sizes, heads: float, choice: Choice) -> Locality:
    """Row after row, the correlation at which the union grows as in the figure."""
    small, choice = _fewer(sizes, choice)
    draws = [_draw(small, heads, torch.Generator().manual_seed(seed)) for seed in range(FIT_SEEDS)]
    found = [ALIKE]
    covered = [choice.pages(_mix(common, own[:1], found)) for common, own in draws]
    for row in range(1, sizes.rows):
        wanted = figure_share(row, sizes.rows) / FIGURE_3[0] * choice.best
        found.append(_falling(partial(_excess_of_row, covered, draws, row, choice, wanted)))
        covered = _with_row(covered, draws, row, choice, found[-1])
    return Locality(tuple(found), heads)


def union_of(active: int, share: float, sizes: Sizes, heads: float, choice: Choice) -> Locality:
    """The same correlation for all rows, at which `active` rows select this share of the pages, or the nearest."""
    small, choice = _fewer(sizes, choice)
    draws = [_draw(small, heads, torch.Generator().manual_seed(seed)) for seed in range(FIT_SEEDS)]
    wanted = share * choice.bounds_PG2D.shape[0]

    def excess(correlation: float) -> float:
        rows = [choice.pages(_mix(common, own[:active], [correlation] * active)) for common, own in draws]
        return _mean_size([each.any(0) for each in rows]) - wanted

    return Locality((_falling(excess),) * sizes.rows, heads)


def figure_share(row: int, rows: int) -> float:
    """The figure at row 0 .. rows - 1; other block lengths than 16 are stretched onto it."""
    at = row * (len(FIGURE_3) - 1) / max(1, rows - 1)
    low = min(int(at), len(FIGURE_3) - 2)
    return FIGURE_3[low] + (at - low) * (FIGURE_3[low + 1] - FIGURE_3[low])


Draw = tuple[Tensor, Tensor]  # what all rows share [1, H, D], and what each has of its own [R, H, D]


def _with_row(covered: list[Tensor], draws: list[Draw], row: int, choice: Choice, correlation: float) -> list[Tensor]:
    """Pages selected so far, bool [1, G, P] per draw, and those of one more row."""
    rows = [choice.pages(_mix(common, own[row : row + 1], [correlation])) for common, own in draws]
    return [before | more for before, more in zip(covered, rows, strict=True)]


def _excess_of_row(
    covered: list[Tensor], draws: list[Draw], row: int, choice: Choice, wanted: float, correlation: float
) -> float:
    return _mean_size(_with_row(covered, draws, row, choice, correlation)) - wanted


def _falling(excess: Callable[[float], float]) -> float:
    """Where a falling function of 0 .. 1 crosses zero, or the nearer end."""
    low, high = 0.0, 1.0
    for _ in range(12):
        middle = (low + high) / 2
        low, high = (middle, high) if excess(middle) > 0 else (low, middle)
    return (low + high) / 2


def _fewer(sizes: Sizes, choice: Choice) -> tuple[Sizes, Choice]:
    groups = min(FIT_GROUPS, sizes.kv_heads)
    small = Sizes(sizes.rows, sizes.heads // sizes.kv_heads * groups, groups, sizes.dim)
    return small, Choice(choice.bounds_PG2D[:, :groups], min(choice.best, choice.bounds_PG2D.shape[0]))


def _mean_size(chosen: Sequence[Tensor]) -> float:
    return sum(each.sum(-1).double().mean().item() for each in chosen) / len(chosen)


def _draw(sizes: Sizes, heads: float, rng: torch.Generator) -> Draw:
    return _heads(sizes, heads, rng, 1), _heads(sizes, heads, rng, sizes.rows)


def _heads(sizes: Sizes, correlation: float, rng: torch.Generator, rows: int) -> Tensor:
    """Vectors of unit variance [rows, H, D]; those of a KV group are correlated."""
    per_kv = sizes.heads // sizes.kv_heads
    group = torch.randn(rows, sizes.kv_heads, 1, sizes.dim, generator=rng)
    own = torch.randn(rows, sizes.kv_heads, per_kv, sizes.dim, generator=rng)
    return (correlation**0.5 * group + (1.0 - correlation) ** 0.5 * own).flatten(1, 2)


def _mix(common: Tensor, own: Tensor, correlations: Sequence[float]) -> Tensor:
    shared = torch.tensor(correlations)[:, None, None]
    return shared.sqrt() * common + (1.0 - shared).sqrt() * own
