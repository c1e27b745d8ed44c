"""Is the engine process alive, and does its work move on? Judged by its heartbeats. Knows no process and no socket."""

from __future__ import annotations

# A process says nothing before its imports are done, and large copies may hold up its heartbeats: on a machine that
# does much else this takes minutes, and to kill it and begin again would not make it faster.
LOADING_S = 300.0


class Vigil:
    """Counts the seconds of silence, and hears of stalled work.

    silence_s: without a word, once it has loaded, a process counts as stopped. stall_s: so long may one forward take.
    A process that loads may say nothing for LOADING_S, or for these if they are longer.
    """

    def __init__(self, silence_s: float, stall_s: float) -> None:
        self._silence_s, self._stall_s = silence_s, stall_s
        self._limit_s = max(silence_s, stall_s, LOADING_S)
        self._silent_s = self._stalled_s = 0.0

    def ready(self) -> None:
        """It has loaded."""
        self._limit_s, self._silent_s = self._silence_s, 0.0

    def heard(self, stalled_s: float | None = None) -> None:
        """It has said something; stalled_s: what a heartbeat says of its work."""
        self._silent_s = 0.0
        if stalled_s is not None:
            self._stalled_s = stalled_s

    def passed(self, seconds: float) -> str | None:
        """Time has passed in which it could have been heard; in words what is wrong, if anything is."""
        self._silent_s += seconds
        if self._silent_s > self._limit_s:
            return f"the engine process has been silent for {self._limit_s:g} s"
        if self._stalled_s > self._stall_s:
            return f"the engine has had work for {self._stall_s:g} s without finishing a forward"
        return None
