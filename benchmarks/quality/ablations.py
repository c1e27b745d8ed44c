"""One choice changed at a time: what each open choice of the methods is worth on the same samples.

Every variant stands beside its method's defaults at the same budget. The block length is not among the choices: the
bundled model was trained with 16 and answers with no other.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from benchmarks.quality.claims import LEVEL
from benchmarks.quality.pools import Pool, difference, pools
from benchmarks.quality.rows import Row
from benchmarks.quality.samples import LATE_KEY
from benchmarks.quality.settings import PLANS, Budget, Options, Setting, budgets
from benchmarks.quality.statistics import Difference, holm
from losa_runtime.sparse.method import method_class

SHARES = (0.02, 0.06)
CONTEXTS = (4096,)
TASKS = ("multi_key", "multi_value", LATE_KEY)
PAGE_SIZES = (8, 32, 64)
OF_PAGES = ("losa", "quest", "losa_plus")  # whose budget is spent on pages, or whose first look is

Value = bool | int | float | str
# method -> option -> values beside the default. What a method does not have (any more) is an error at the start.
OPTIONS: dict[str, dict[str, tuple[Value, ...]]] = {
    "losa": {
        "first_step": ("sparse",),
        "granularity": ("head",),
        "reference": ("refresh",),
        "share": ("mean", "none"),
        "pages": ("own",),
        "refresh_every": (2, 4),
        "dense_layers": (1,),
    },
    "quest": {"first_step": ("dense",), "share": ("mean", "none"), "pages": ("own",), "dense_layers": (1,)},
    "losa_plus": {
        "tolerance": (0.0, 0.02, 0.1, 0.2),
        "remainder": (False,),
        "granule": ("page",),
        "spread": (1, 16),
        "novelty": (0.0, 0.5, 2.0),
    },
    "mage": {"dense_layers": (1,), "layer_adaptive": (True,)},
    "sparsed": {"block_size": (32, 128), "dense_share": (0.1, 0.4)},
    "sparse_dllm": {"delay": (0, 2), "kernel": (1, 5)},
    "ba_att": {"sort": (True,), "block_size": (32, 128), "beta": (0.0,), "variance_layers": ("all",)},
}
# Choices that mean little one by one: the paper's, behind the dense first step of the others and without one.
TOGETHER: dict[str, tuple[dict[str, Value], ...]] = {
    "ba_att": ({"block_size": 128, "sort": True}, {"block_size": 128, "sort": True, "first_step": "sparse"}),
}
ACTIVE: dict[str, tuple[int | float, ...]] = {
    "active_tokens": (0, 1, 2, 3, 8, 12, 16),
    "active_tau": (0.3, 0.5, 0.7, 0.9),
}


class Variant(NamedTuple):
    """choice: what is changed; value: to what. setting: one per budget."""

    method: str
    choice: str
    value: str

    @property
    def name(self) -> str:
        """Of its rows; the method's own where nothing is changed."""
        return f"{self.method} {self.choice} {self.value}" if self.choice else self.method

    @classmethod
    def of(cls, method: str, changed: Mapping[str, Value]) -> Variant:
        """With these options."""
        return cls(method, ", ".join(changed), ", ".join(map(str, changed.values())))


def variants() -> list[Variant]:
    """All that are tried with the usual page size, each method's defaults first."""
    found = []
    for method in OPTIONS:
        found.append(Variant(method, "", ""))
        if method == "losa":
            found += [Variant(method, rule, str(value)) for rule, values in ACTIVE.items() for value in values]
        found += [Variant.of(method, changed) for changed in _changes(method)]
    return found


def settings(
    context: int, page_size: int, methods: Collection[str] = tuple(OPTIONS), shares: Iterable[float] = SHARES
) -> list[Setting]:
    """Every variant of these methods at every budget with the usual page size."""
    found = []
    for budget in budgets(context, shares, page_size):
        for method in OPTIONS:
            if method in methods:
                plan = PLANS.get(method, {})
                found.append(Setting.of(method, method, budget, plan))
                if method == "losa":
                    found += _active(budget)
                found += [_changed(method, changed, budget, plan) for changed in _changes(method)]
    return found


def settings_of_pages(
    context: int, page_size: int, methods: Collection[str] = OF_PAGES, shares: Iterable[float] = SHARES
) -> list[Setting]:
    """Those of these methods that read pages, with pages of this size."""
    return [
        Setting.of(Variant(method, "page_size", str(page_size)).name, method, budget)
        for budget in budgets(context, shares, page_size)
        for method in OF_PAGES
        if method in methods
    ]


def table(rows: Sequence[Row], console: Console) -> None:
    """Every variant against its method's defaults: accuracy of the questions, and what was read."""
    questions = [row for row in rows if row.task != LATE_KEY]
    late = {(pool.name, pool.strength): pool for pool in pools(row for row in rows if row.task == LATE_KEY)}
    every = pools(questions)
    base = {(pool.name, pool.strength): pool for pool in every}
    shown = Table(title="one choice at a time; differences to the method's defaults at the same budget, in points")
    for name in (
        "method",
        "choice",
        "value",
        "budget",
        "right",
        "difference",
        "late keys",
        "KV",
        "rows",
        "bytes",
        "all",
    ):
        shown.add_column(name, justify="left" if name in ("method", "choice", "value") else "right")
    for variant in [*variants(), *(Variant(m, "page_size", str(size)) for m in OF_PAGES for size in PAGE_SIZES)]:
        mine = [pool for pool in every if pool.name == variant.name]
        differences = _differences(mine, [base.get((variant.method, pool.strength)) for pool in mine])
        for pool, gain in zip(mine, differences, strict=True):
            other = late.get((pool.name, pool.strength))
            cells = (pool.strength.label, f"{pool.accuracy:.1%}", gain if variant.choice else "")
            shown.add_row(*variant, *cells, "-" if other is None else f"{other.accuracy:.0%}", *_read(pool))
    console.print(shown)


def _active(budget: Budget) -> list[Setting]:
    return [
        Setting.of(Variant("losa", rule, str(value)).name, "losa", budget, active=(rule, value))
        for rule, values in ACTIVE.items()
        for value in values
    ]


def _changes(method: str) -> list[dict[str, Value]]:
    """What is changed of a method's options, variant by variant."""
    alone = [{option: value} for option, values in OPTIONS[method].items() for value in values]
    return [*alone, *TOGETHER.get(method, ())]


def _changed(method: str, changed: Mapping[str, Value], budget: Budget, plan: Options) -> Setting:
    unknown = changed.keys() - method_class(method).Options.model_fields.keys()
    assert not unknown, f"{method!r} has no option {', '.join(sorted(unknown))}"
    return Setting.of(Variant.of(method, changed).name, method, budget, {**plan, **changed})


def _differences(mine: Sequence[Pool], others: Iterable[Pool | None]) -> list[str]:
    """Points with their interval; a star where Holm's correction over the budgets of the variant leaves it."""
    found = [None if other is None else difference(pool, other) for pool, other in zip(mine, others, strict=True)]
    adjusted = iter(holm([one.p for one in found if one is not None]))
    return ["-" if one is None else _points(one) + "*" * (next(adjusted) < LEVEL) for one in found]


def _points(one: Difference) -> str:
    return f"{100 * one.mean:+.1f} [{100 * one.low:+.1f}, {100 * one.high:+.1f}]"


def _read(pool: Pool) -> list[str]:
    figures = [
        pool.mean(lambda r: r.density_kv),
        pool.mean(lambda r: r.bytes_ratio),
        pool.mean(lambda r: r.block_bytes_ratio),
    ]
    kv, later, whole = ("-" if value is None else f"{value:.1%}" for value in figures)
    rows = pool.mean(lambda r: r.active_rows)
    return [kv, "-" if rows is None else f"{rows:.1f}", later, whole]
