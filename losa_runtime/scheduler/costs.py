"""Adding up what denoising steps read, per request and for everything an engine did. Knows no request, no policy."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from losa_runtime.core.request import RequestStats
from losa_runtime.core.work import SegmentCost


class CostSum:
    """Running sums behind RequestStats."""

    def __init__(self) -> None:
        self.forwards = self.blocks = self.steps = self.dense_steps = self.retractions = 0
        self.kv_bytes = self.metadata_bytes = self.dense_bytes = 0
        self.queued_s: float | None = None
        self._later = self._later_read = self._later_dense = 0
        self._kv = self._q = self._active = 0.0
        self._unmasked, self._overlap = 0, 0.0

    def add_step(self, cost: SegmentCost, first: bool, unmasked: Sequence[int]) -> None:
        """Count one denoising step. unmasked: offsets accepted in the step before, for the overlap with active rows.

        Densities are averaged over the steps after a block's first.
        """
        self.steps += 1
        self.dense_steps += cost.dense
        self.kv_bytes += cost.kv_bytes
        self.metadata_bytes += cost.metadata_bytes
        self.dense_bytes += cost.dense_bytes
        if not first:
            self._later += 1
            self._kv += cost.density_kv
            self._q += cost.density_q
            self._active += sum(cost.active) / len(cost.active)
            self._later_read += cost.kv_bytes + cost.metadata_bytes
            self._later_dense += cost.dense_bytes
            self._unmasked += len(unmasked)
            self._overlap += sum(cost.active[offset] for offset in unmasked)

    def stats(self) -> RequestStats:
        """The sums as reported to the user."""
        read = self.kv_bytes + self.metadata_bytes
        return RequestStats(
            forwards=self.forwards,
            blocks=self.blocks,
            denoise_steps=self.steps,
            dense_steps=self.dense_steps,
            kv_density=_ratio(self._kv, self._later),
            kv_density_q=_ratio(self._q, self._later),
            active_share=_ratio(self._active, self._later),
            active_overlap=_ratio(self._overlap, self._unmasked),
            kv_bytes=self.kv_bytes,
            metadata_bytes=self.metadata_bytes,
            dense_bytes=self.dense_bytes,
            bytes_ratio=_ratio(self._later_read, self._later_dense),
            block_bytes_ratio=_ratio(read, self.dense_bytes),
            retractions=self.retractions,
            queued_s=self.queued_s,
        )


def _ratio(part: float, whole: int) -> float | None:
    return part / whole if whole else None


class ReadSum:
    """What all denoising steps of an engine have read of their prefixes, in bytes."""

    def __init__(self) -> None:
        self._steps = self._kv = self._metadata = self._dense = 0

    def add(self, costs: Iterable[SegmentCost]) -> None:
        """Count the steps of one round."""
        for cost in costs:
            self._steps += 1
            self._kv += cost.kv_bytes
            self._metadata += cost.metadata_bytes
            self._dense += cost.dense_bytes

    def stats(self) -> dict[str, object]:
        """JSON-able; the names are those of RequestStats."""
        return {
            "denoise_steps": self._steps,
            "kv_bytes": self._kv,
            "metadata_bytes": self._metadata,
            "dense_bytes": self._dense,
            "block_bytes_ratio": _ratio(self._kv + self._metadata, self._dense),
        }
