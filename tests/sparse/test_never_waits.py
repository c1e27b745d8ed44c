"""No layer of a later denoising step waits for the device on the Triton backend, and none brings host values to it.

Twice, for lack of a GPU: recorded on a tape, which refuses what a CUDA stream refuses while it is captured, in Triton's
interpreter; and on the device `meta`, whose tensors have no values that anybody could ask for and mix with those of no
other device, with launches noted instead of run.
"""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

import pytest
import torch

from losa_kernels.triton.launch import noted_launches
from losa_runtime.attention.questions import PageChoice, PerSegment, RowGroup, Rows, SelectedPages
from losa_runtime.attention.triton_backend import TritonBackend
from losa_runtime.core.batch import ForwardMode, SparseParams
from tests.kernels import interpreter as interpreter  # lets it serve
from tests.runner.tape import CaptureRefused, Tape
from tests.sparse.stage import Item, Sizes, Stage, denoise_item, params

CPU, META = torch.device("cpu"), torch.device("meta")
SIZES = Sizes(layers=2, heads=2, kv_heads=1, dim=16, block=4, page=8)
PROMPTS = {"long": 36, "short": 8}  # the other lies within the budget


class Case(NamedTuple):
    """A method with options. opens: whether its first step, too, gets along without the device's word."""

    method: str
    options: dict[str, Any] = {}  # noqa: RUF012 - never written to
    rule: tuple[float, str] = (2, "count")
    opens: bool = True


CASES = {
    "dense": Case("dense"),
    "quest": Case("quest"),
    "quest, lists per head": Case("quest", {"share": "none"}),
    "quest, lists per row": Case("quest", {"pages": "own", "share": "mean"}),
    "losa": Case("losa"),
    "losa, by share of change": Case("losa", rule=(0.5, "tau")),
    "losa, since the last refresh": Case("losa", {"reference": "refresh"}),
    "losa, lists per row and head": Case("losa", {"pages": "own", "share": "none"}),
    "losa, refreshed now": Case("losa", {"refresh_every": 2}),
    "mage": Case("mage", opens=False),
    "sparsed": Case("sparsed", opens=False),
    "sparse_dllm": Case("sparse_dllm", opens=False),
    "flashblock, at rest": Case("flashblock", {"refresh_tokens": 4}),
    "flashblock, refreshed now": Case("flashblock", {"refresh_tokens": 2}),
}


def sparse_of(case: Case) -> SparseParams:
    return params(case.method, 16, *case.rule, planned_steps=4, **case.options)


def step_of(case: Case, step: int) -> list[Item]:
    """The requests of PROMPTS in one step, each in its own slot."""
    named = enumerate(PROMPTS.items())
    return [denoise_item(name, prompt, sparse_of(case), step, slot, SIZES) for slot, (name, prompt) in named]


def stage_on(device: torch.device, case: Case) -> Stage:
    """All prompts stored, and all steps before the third one done."""
    stage = Stage(SIZES, backend=TritonBackend, device=device)
    stores = [Item(name, ForwardMode.PREFILL, 0, prompt) for name, prompt in PROMPTS.items()]
    for items in (stores, step_of(case, 0), step_of(case, 1)):
        attend, _ = stage.begin(*items)
        for layer in range(SIZES.layers):
            attend(layer, *stage.inputs(items, layer))
    return stage


def record_second_layer(stage: Stage, case: Case) -> Tape:
    """The third step; its first layer is run, since it may bring to the device what all layers share."""
    items = step_of(case, 2)
    attend, _ = stage.begin(*items)
    attend(0, *stage.inputs(items, 0))
    inputs, tape = stage.inputs(items, 1), Tape()
    tape.record(lambda: attend(1, *inputs))  # type: ignore[arg-type, func-returns-value]
    assert len(attend.report()) == len(PROMPTS)
    return tape


@pytest.fixture(autouse=True)
def _backend() -> None:
    """One backend, whatever the suite's are."""


FAST = ("dense", "quest", "losa", "mage", "flashblock, at rest")


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in FAST else (pytest.mark.slow,)) for n in CASES])
def test_a_later_step_can_be_captured(name: str) -> None:
    assert len(record_second_layer(stage_on(CPU, CASES[name]), CASES[name]))


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.opens])
def test_nobody_asks_for_values(name: str) -> None:
    """Storing and the first step neither."""
    with noted_launches() as launches:
        stage = stage_on(META, CASES[name])
        items = step_of(CASES[name], 2)
        attend, _ = stage.begin(*items)
        for layer in range(SIZES.layers):
            assert attend(layer, *stage.inputs(items, layer)).is_meta
    assert launches and all(
        x.is_meta for one in launches for x in one.arguments.values() if isinstance(x, torch.Tensor)
    )


def test_a_later_layer_of_losa_is_nine_launches() -> None:
    with noted_launches() as launches:
        stage, items = stage_on(META, CASES["losa"]), step_of(CASES["losa"], 2)
        attend, _ = stage.begin(*items)
        attend(0, *stage.inputs(items, 0))
        launches.clear()
        attend(1, *stage.inputs(items, 1))
    names = ("change", "active", "plan", "scores", "bars", "mark", "list", "prefix", "block")
    assert Counter(one.kernel.__name__ for one in launches) == Counter(f"_{name}_kernel" for name in names)


@pytest.mark.parametrize("device", [CPU, META], ids=str)
def test_whoever_asks_is_found_out(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """A backend that wants to know how many pages were chosen, as one might in passing."""
    select = TritonBackend.select_pages

    def curious(
        self: TritonBackend,
        layer: int,
        q_RHD: torch.Tensor,
        rows: Rows | None,
        whole: tuple[bool, ...],
        best: PerSegment,
        group: RowGroup,
        choice: PageChoice,
        heads_nH: torch.Tensor | None,
    ) -> SelectedPages:
        chosen = select(self, layer, q_RHD, rows, whole, best, group, choice, heads_nH)
        assert layer == 0 or chosen.kv.indptr[-1].item() >= 0
        return chosen

    monkeypatch.setattr(TritonBackend, "select_pages", curious)
    if device == META:
        with noted_launches(), pytest.raises(RuntimeError, match="cannot be called on meta"):
            stage_on(META, CASES["losa"])
    else:
        stage = stage_on(CPU, CASES["losa"])
        with pytest.raises(CaptureRefused, match="item waits for the device"):
            record_second_layer(stage, CASES["losa"])
