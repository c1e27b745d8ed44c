"""What is compared: each registered method at each budget, with the options that make the comparison fair.

A budget is a share of the context, rounded to whole pages. Options differ from a method's defaults only where `PLANS`
says why. Knows no samples and no engine.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
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


class Budget(NamedTuple):
    """tokens: whole pages. share: of the context, before rounding."""

    tokens: int
    share: float


class Setting(NamedTuple):
    """One way to read the prefix. name: of the row in tables; usually the method's.

    budget: tokens, None where the method has none; share: of the context, before rounding to pages. options: the
    method's own, sorted pairs; active: LoSA's rule, e.g. ("active_tokens", 3), None = its default.
    """

    name: str
    method: str
    budget: int | None = None
    share: float | None = None
    options: tuple[tuple[str, bool | int | float | str], ...] = ()
    active: tuple[str, int | float] | None = None

    @classmethod
    def of(
        cls,
        name: str,
        method: str,
        budget: Budget | None = None,
        options: Options | None = None,
        active: tuple[str, int | float] | None = None,
    ) -> Setting:
        """With the options in their canonical order."""
        tokens, share = budget or (None, None)
        return cls(name, method, tokens, share, tuple(sorted((options or {}).items())), active)

    def params(self, decoding: Decoding) -> DiffusionParams:
        """What a request asks for."""
        wanted = {
            "sparse_method": self.method,
            "token_budget": self.budget,
            "sparse_options": dict(self.options) or None,
            **decoding.params,
        }
        if self.active is not None:
            rule, value = self.active
            wanted[rule] = value
        return DiffusionParams.model_validate(wanted)


# Options that differ from a method's defaults; tried on other documents, the best for the method is taken.
PLANS: dict[str, Options] = {
    # Key blocks of 32 tokens round budgets up, and find less than those of a page.
    "sparsed": {"block_size": 16},
    # Behind a dense first step as most of the others. Sorting by norm means nothing where keys are normalised: all have
    # nearly the same norm, and 0 % of the answers were right; blocks of 128 tokens are too coarse for single sentences.
    "ba_att": {"block_size": 16, "sort": False, "first_step": "dense"},
}

# A row beside the methods: QUEST behind a dense first step, as LoSA has one.
QUEST_DENSE_FIRST = "quest_dense_first"


def names() -> list[str]:
    """Everything that can be asked for: the registered methods and the rows beside them."""
    return [*METHODS, QUEST_DENSE_FIRST]


def budgets(context: int, shares: Iterable[float], page_size: int) -> list[Budget]:
    """Shares of the context in whole pages, at least one; of shares that give the same tokens only the smallest."""
    found: dict[int, Budget] = {}
    for share in sorted(shares):
        tokens = max(1, round(context * share / page_size)) * page_size
        found.setdefault(tokens, Budget(tokens, share))
    return list(found.values())


def settings(wanted: Iterable[str], context: int, shares: Iterable[float], page_size: int) -> list[Setting]:
    """The settings of these rows at one context, dense first, neighbours of one method together."""
    chosen = set(wanted)
    unknown = chosen - set(names())
    assert not unknown, f"methods: found {sorted(unknown)}, allowed: {', '.join(names())}"
    tokens = budgets(context, shares, page_size)
    found: list[Setting] = []
    for name in names():
        if name in chosen:
            found += _of(name, tokens)
    return found


def _of(name: str, tokens: list[Budget]) -> list[Setting]:
    if name == QUEST_DENSE_FIRST:
        return [Setting.of(name, "quest", budget, {"first_step": "dense"}) for budget in tokens]
    if name == "flashblock":
        return [Setting.of(name, name, options={"refresh_tokens": count}) for count in REFRESH_TOKENS]
    if not method_class(name).has_budget:
        return [Setting.of(name, name)]
    return [Setting.of(name, name, budget, PLANS.get(name)) for budget in tokens]
