"""A stand-in for flashinfer-python on any device: the same class, computed plainly, and strict where that is not.

What the real one would get wrong without a word is an error here: lengths that change under a split plan, an output
that is not given, rows that were not planned, an early start on lengths that a kernel before it has just written.
"""

from __future__ import annotations

import math
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from losa_runtime.attention.flashinfer_interface import VERSIONS, WRAPPER
from tests.runner.tape import device_call

EMPTY = -5e4


class FakeWrapper:
    """See the real one. `made` counts them. A run is one call of the device, as a tape sees it."""

    made = 0

    def __init__(
        self,
        float_workspace_buffer: Tensor,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        backend: str = "auto",
    ) -> None:
        assert kv_layout == "HND" and backend == "fa2" and not use_cuda_graph
        assert float_workspace_buffer.numel() >= 128 << 20
        type(self).made += 1
        self.device, self._planned = float_workspace_buffer.device, False

    def reset_workspace_buffer(self, float_workspace_buffer: Tensor, int_workspace_buffer: Tensor) -> None:
        assert not self._planned, "the tables of the plan lie in the buffer that is taken away"
        self._int_bytes = int_workspace_buffer.numel()

    def plan(
        self,
        qo_indptr: Tensor,
        paged_kv_indptr: Tensor,
        paged_kv_indices: Tensor,
        paged_kv_last_page_len: Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        page_size: int,
        causal: bool = False,
        sm_scale: float | None = None,
        q_data_type: str | torch.dtype = "float16",
        kv_data_type: str | torch.dtype | None = None,
        max_token_per_sequence: int | None = None,
        disable_split_kv: bool = False,
    ) -> None:
        given = (qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len)
        assert {x.dtype for x in given} == {torch.int32} and qo_indptr.device.type == "cpu"
        assert q_data_type in (torch.float16, torch.bfloat16) and kv_data_type == q_data_type and not causal
        assert num_qo_heads % num_kv_heads == 0 and len(qo_indptr) == len(paged_kv_indptr) > 1
        assert len(paged_kv_last_page_len) == len(qo_indptr) - 1
        counts = qo_indptr.diff()
        assert int(counts.min()) >= 0 and max_token_per_sequence in (None, int(counts.max()))
        self._qo = qo_indptr.tolist()
        # As with the real one, a tensor that lies on the device already is not copied.
        self._indptr, self._indices, self._last = (x.to(self.device) for x in given[1:])
        self._lengths = None if disable_split_kv else self._device_lengths(page_size)
        assert disable_split_kv or self._indptr[-1] == len(self._indices)
        self._shape, self._scale = (num_qo_heads, num_kv_heads, head_dim_qk, page_size), sm_scale
        self._dtype, self._planned = q_data_type, True

    def run(
        self,
        q: Tensor,
        paged_kv_cache: tuple[Tensor, Tensor],
        *,
        out: Tensor | None = None,
        lse: Tensor | None = None,
        return_lse: bool = False,
        enable_pdl: bool | None = None,
    ) -> tuple[Tensor, Tensor]:
        heads, kv_heads, dim, page_size = self._shape
        assert self._planned and enable_pdl is False and return_lse
        assert q.shape == (self._qo[-1], heads, dim) and q.dtype == self._dtype and q.stride(-1) == 1
        assert out is not None and out.shape == q.shape and out.dtype == q.dtype and out.is_contiguous()
        assert lse is not None and lse.shape == q.shape[:2] and lse.dtype == torch.float32 and lse.is_contiguous()
        for cache in paged_kv_cache:
            assert cache.shape[1:] == (kv_heads, page_size, dim) and cache.dtype == q.dtype
        device_call(lambda: self._compute(q, paged_kv_cache, out, lse))
        return out, lse

    def _compute(self, q: Tensor, paged_kv_cache: tuple[Tensor, Tensor], out: Tensor, lse: Tensor) -> None:
        lengths = self._device_lengths(self._shape[3])
        assert self._lengths in (None, lengths), "lengths changed under a plan that splits"
        ends = self._indptr.tolist()
        for entry, length in enumerate(lengths):
            rows = slice(self._qo[entry], self._qo[entry + 1])
            out[rows], lse[rows] = 0.0, EMPTY
            if length:
                pages = self._indices[ends[entry] : ends[entry + 1]].long()
                k, v = (x[pages].transpose(0, 1).flatten(1, 2)[:, :length].double() for x in paged_kv_cache)
                out[rows], lse[rows] = self._attend(q[rows].double(), k, v)

    def _device_lengths(self, page_size: int) -> list[int]:
        counts = self._indptr.diff().tolist()
        last = self._last.tolist()
        assert all(0 < n <= page_size for n, count in zip(last, counts, strict=True) if count)
        return [(count - 1) * page_size + n if count else 0 for n, count in zip(last, counts, strict=True)]

    def _attend(self, q_RHD: Tensor, k_GND: Tensor, v_GND: Tensor) -> tuple[Tensor, Tensor]:
        share = q_RHD.shape[1] // k_GND.shape[0]
        k_HND, v_HND = (x.repeat_interleave(share, 0) for x in (k_GND, v_GND))
        scores_HRN = torch.einsum("rhd,hnd->hrn", q_RHD, k_HND) * (self._scale or q_RHD.shape[-1] ** -0.5)
        out_RHD = torch.einsum("hrn,hnd->rhd", scores_HRN.softmax(-1), v_HND)
        return out_RHD.to(self._dtype), (scores_HRN.logsumexp(-1).T / math.log(2)).float()


def install(monkeypatch: pytest.MonkeyPatch, version: str = VERSIONS[0], wrapper: Any = FakeWrapper) -> ModuleType:
    """Let `import flashinfer` find a package with this wrapper."""
    package = ModuleType("flashinfer")
    package.__dict__.update({"__version__": version, WRAPPER: wrapper})
    monkeypatch.setitem(sys.modules, "flashinfer", package)
    return package
