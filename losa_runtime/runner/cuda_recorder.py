"""Recordings as CUDA graphs, which share one pool of memory: they never run at the same time."""

from __future__ import annotations

from collections.abc import Callable

import torch

from losa_runtime.runner.graphs import Recording


class CudaRecorder:
    """See `Recorder`."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()

    def record(self, run: Callable[[], None]) -> Recording:
        """Run twice beside the current stream (kernels are compiled, workspaces made), then capture."""
        side = torch.cuda.Stream(self._device)
        side.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(side):
            run()
            run()
        torch.cuda.current_stream(self._device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=side):
            run()
        return graph
