"""What ties the engine process to its parent: it never outlives the HTTP process, however that ends."""

from __future__ import annotations

import ctypes
import logging
import os
import shutil
import signal
import sys
import threading
import time

log = logging.getLogger("losa.engine")

PARENT_POLL_S = 0.25
_PR_SET_PDEATHSIG = 1


def watch_parent(parent: int, socket_directory: os.PathLike[str]) -> None:
    """End this process within a second of its parent's death, in the middle of a long step and even when stopped.

    Runs in a daemon thread. The parent can no longer remove the socket directory, so this does.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(PARENT_POLL_S)
        log.error("the HTTP process is gone; the engine ends")
        shutil.rmtree(socket_directory, ignore_errors=True)
        os._exit(1)

    _be_continued_at_death_of_parent()
    threading.Thread(target=watch, name="watch-parent", daemon=True).start()


def _be_continued_at_death_of_parent() -> None:
    """A stopped process cannot watch. SIGCONT does nothing to one that runs, and lets a stopped one see to its end."""
    if sys.platform != "linux":
        return
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(signal.SIGCONT), 0, 0, 0) != 0:
        log.warning("no signal at the parent's death (errno %d): a stopped engine could outlive it", ctypes.get_errno())
