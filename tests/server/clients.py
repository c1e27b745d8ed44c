"""Clients of the echo engine, of which each must come to an end."""

from __future__ import annotations

from benchmarks.drills import clients
from benchmarks.drills.clients import Ending


class Clients(clients.Clients):
    """text: of the prompt; "SLOW fox" takes 50 ms per four tokens and client. tokens: wanted."""

    def __init__(self, url: str, count: int, text: str = "SLOW fox", tokens: int = 4000, started: bool = True) -> None:
        body = {"text": text, "sampling_params": {"max_new_tokens": tokens, "ignore_eos": True}}
        super().__init__(url, count, body, started)

    def join(self, seconds: float) -> list[Ending]:
        """All endings. Fails if a client still waits then."""
        endings = super().join(seconds)
        assert self.waiting == 0, f"{self.waiting} clients wait"
        return endings
