"""What is compared: each registered method at each budget, with the options that make the comparison fair.

A budget is a share of the context, rounded to whole pages. Options differ from a method's defaults only where its
default unit would make one budget out of several; `PLANS` says why. Knows no samples and no engine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from losa_runtime.core.sampling_params import DiffusionParams
from losa_runtime.sparse.method import METHODS, method_class

BUDGET_SHARES = (0.01, 0.02, 0.03, 0.06, 0.12, 0.25)
REFRESH_TOKENS = (1, 2, 4, 8, 16)  # FlashBlock's knob in the place of a budget

Options = Mapping[str, bool | int | float | str]


class Decoding(NamedTuple):
    """How blocks are unmasked: a fixed number of steps, or (None) all tokens that are sure enough in each step."""

    steps: int | None = 8
    threshold: float = 0.9

    @property
    def params(self) -> dict[str, object]:
        """As fields of DiffusionParams."""
        if self.steps is None:
            return {"algorithm": "low_confidence_dynamic", "threshold": self.threshold}
        return {"algorithm": "low_confidence_static", "denoising_steps": self.steps}


class Setting(NamedTuple):
    """One way to read the prefix. name: of the row in tables; usually the method's.

    budget: tokens, None where the method has none. options: the method's own, sorted pairs; active_tokens: LoSA's rule.
    """

    name: str
    method: str
    budget: int | None = None
    options: tuple[tuple[str, bool | int | float | str], ...] = ()
    active_tokens: int | None = None

    @classmethod
    def of(
        cls,
        name: str,
        method: str,
        budget: int | None = None,
        options: Options | None = None,
        active: int | None = None,
    ) -> Setting:
        """With the options in their canonical order."""
        return cls(name, method, budget, tuple(sorted((options or {}).items())), active)

    def params(self, decoding: Decoding) -> DiffusionParams:
        """What a request asks for."""
        return DiffusionParams(
            sparse_method=self.method,
            token_budget=self.budget,
            active_tokens=self.active_tokens,
            sparse_options=dict(self.options) or None,
            **decoding.params,  # type: ignore[arg-type]
        )

    @property
    def shown_options(self) -> dict[str, bool | int | float | str]:
        """All that differs from the defaults beside the budget, for records."""
        own = dict(self.options)
        return own if self.active_tokens is None else own | {"active_tokens": self.active_tokens}


def _unit(budget: int, most: int) -> int:
    """The largest power of two up to `most` that divides the budget into at least four units (or else the smallest
    page-sized one), so that equal budgets are equal amounts for every method."""
    unit = most
    while unit > 16 and (budget % unit or budget // unit < 4):
        unit //= 2
    return unit


# method -> options for a budget. What is absent here runs with its defaults.
PLANS: dict[str, Callable[[int], Options]] = {
    # Its key blocks of 32 tokens would round budgets up.
    "sparsed": lambda budget: {"block_size": _unit(budget, 32)},
    # The same for 128; and its first step is dense as those of the others are.
    "ba_att": lambda budget: {"block_size": _unit(budget, 128), "first_step": "dense"},
}

# Rows beside the methods: name -> (method, active rows as a share of the block).
# LoSA with every row active reads what QUEST reads, behind a dense first step.
ALL_ROWS = "losa_all_rows"


def names() -> list[str]:
    """Everything that can be asked for: the registered methods and the rows beside them."""
    return [*METHODS, ALL_ROWS]


def budgets(context: int, shares: Iterable[float], page_size: int) -> list[int]:
    """Shares of the context in whole pages, at least one, without repetition."""
    tokens = (max(1, round(context * share / page_size)) * page_size for share in shares)
    return sorted(set(tokens))


def settings(
    wanted: Iterable[str], context: int, shares: Iterable[float], page_size: int, block_length: int
) -> list[Setting]:
    """The settings of these rows at one context, dense first, neighbours of one method together."""
    chosen = set(wanted)
    unknown = chosen - set(names())
    assert not unknown, f"methods: found {sorted(unknown)}, allowed: {', '.join(names())}"
    tokens = budgets(context, shares, page_size)
    found: list[Setting] = []
    for name in names():
        if name in chosen:
            found += _of(name, tokens, block_length)
    return found


def _of(name: str, tokens: list[int], block_length: int) -> list[Setting]:
    if name == ALL_ROWS:
        return [Setting.of(name, "losa", budget, active=block_length) for budget in tokens]
    if name == "flashblock":
        return [Setting.of(name, name, options={"refresh_tokens": count}) for count in REFRESH_TOKENS]
    if not method_class(name).has_budget:
        return [Setting.of(name, name)]
    plan = PLANS.get(name, lambda _: {})
    return [Setting.of(name, name, budget, plan(budget)) for budget in tokens]
