"""Launching a forward on a device asks it for nothing, and what the host brings to it grows neither with layers nor
with requests. On the device `meta`, whose tensors have no values to ask for; kernels are noted instead of run.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from losa_kernels.triton.launch import Launch, noted_launches
from losa_runtime.attention.questions import PrefixPlan, PrefixState, RowGroup
from losa_runtime.attention.triton_backend import TritonBackend
from losa_runtime.cache.kv_pool import KVPool
from losa_runtime.core.batch import ForwardMode, SparseParams
from losa_runtime.core.work import Round, WorkItem
from losa_runtime.layers.mixture import use_kernels
from losa_runtime.models.model import BlockDiffusionModel, empty_model
from losa_runtime.models.random_checkpoint import write_random_checkpoint
from losa_runtime.runner.model_runner import ModelRunner
from losa_runtime.runner.unmask import Unmasker
from losa_runtime.sparse.memory import Geometry
from losa_runtime.sparse.method import declared_summaries, make_methods
from tests.kernels import interpreter as interpreter  # asks for it before triton is loaded
from tests.sparse.stage import params

META, PAGE, SLOTS, PREFIX = torch.device("meta"), 16, 8, 64


@pytest.fixture(scope="module", params=["SDARForCausalLM", "LLaDA2MoeModelLM"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> BlockDiffusionModel:
    """One without experts and one with them."""
    folder = tmp_path_factory.mktemp(request.param)
    config = write_random_checkpoint(folder, architecture=request.param)
    return empty_model(config).to(META).requires_grad_(False)


@pytest.fixture
def runner(model: BlockDiffusionModel) -> ModelRunner:
    c = model.config
    sizes = (c.num_layers, 400, c.num_kv_heads, PAGE, c.head_dim)
    pool = KVPool(*sizes, torch.float32, META, declared_summaries())
    geometry = Geometry(c.num_layers, c.num_heads, c.num_kv_heads, c.head_dim, c.block_length, PAGE, SLOTS, 1024, META)
    backend = TritonBackend(pool, c.num_heads, context_length=1024)
    use_kernels(model, backend.kernels)
    unmasker = Unmasker(model, c.mask_token_id, c.vocab_size, c.block_length)
    return ModelRunner(model, backend, make_methods(geometry), unmasker, META)


class Uploads(TorchFunctionMode):
    """Counts what is brought from the host to another device, by whatever call."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(
        self, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        if isinstance(made, Tensor) and made.device == META:
            before = [x for x in args if isinstance(x, Tensor)]
            moved = bool(before) and all(x.device != META for x in before)
            self.count += moved or func in (torch.tensor, torch.as_tensor)
        return made


def item(model: BlockDiffusionModel, mode: ForwardMode, slot: int, sparse: SparseParams | None = None) -> WorkItem:
    length = 2 * model.config.block_length if mode is ForwardMode.PREFILL else model.config.block_length
    start = 0 if mode is ForwardMode.PREFILL else PREFIX
    pages = np.arange(PREFIX // PAGE + 1) + 8 * slot
    step = 1 if mode is ForwardMode.DENOISE else 0
    return WorkItem(mode, np.zeros(length, dtype=np.int64), start, pages, slot=slot, step=step, sparse=sparse)


def launch(runner: ModelRunner, *items: WorkItem) -> list[Launch]:
    with noted_launches() as launches:
        runner.launch(Round(items, ()))
    return launches


@pytest.mark.parametrize("method", ["dense", "quest", "losa", "flashblock"])
def test_nothing_is_asked_of_the_device(runner: ModelRunner, method: str) -> None:
    """Prompts and finished blocks that are stored, first steps and later ones, two requests at different points."""
    model, sparse = runner.model, params(method, 16)
    launch(runner, item(model, ForwardMode.PREFILL, 0), item(model, ForwardMode.PREFILL, 1))
    launch(runner, item(model, ForwardMode.OPEN, 0, sparse))
    both = launch(
        runner,
        item(model, ForwardMode.COMMIT, 2),
        item(model, ForwardMode.DENOISE, 0, sparse),
        item(model, ForwardMode.OPEN, 1, sparse),
    )
    names = Counter(one.kernel.__name__ for one in both)
    experts = model.config.experts
    assert names["_gate_kernel"] == names["_down_kernel"] == (0 if experts is None else 1)
    assert names["_store_kernel"] == names["_prefill_kernel"] == names["_block_kernel"] == model.config.num_layers


@pytest.mark.parametrize("method", ["dense", "quest", "losa", "flashblock"])
def test_what_is_brought_to_the_device_grows_with_nothing(runner: ModelRunner, method: str) -> None:
    sparse, slots, counts = params(method, 16), range(SLOTS), []
    launch(runner, *(item(runner.model, ForwardMode.OPEN, slot, sparse) for slot in slots))
    for some in (slots[:1], slots):
        with Uploads() as uploads:
            launch(runner, *(item(runner.model, ForwardMode.DENOISE, slot, sparse) for slot in some))
        counts.append(uploads.count)
    assert counts[0] == counts[1] and 1 <= counts[0] <= 8


def test_whoever_brings_something_in_every_layer_is_found_out(
    runner: ModelRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefix = TritonBackend.prefix

    def careless(self: TritonBackend, layer: int, q_RHD: Tensor, plan: PrefixPlan, group: RowGroup) -> PrefixState:
        torch.tensor(group.prefix_lens, device=META)
        return prefix(self, layer, q_RHD, plan, group)

    with Uploads() as clean:
        launch(runner, item(runner.model, ForwardMode.OPEN, 0, params("dense", 16)))
    monkeypatch.setattr(TritonBackend, "prefix", careless)
    with Uploads() as uploads:
        launch(runner, item(runner.model, ForwardMode.OPEN, 0, params("dense", 16)))
    assert uploads.count == clean.count + runner.model.config.num_layers
