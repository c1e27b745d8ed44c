"""Where a checkpoint is: a local folder, or a hub repository that is downloaded (or found in the local cache).

Fetches only what is ever read: JSON, safetensors and chat templates, never code or pickles. Loads no torch.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from losa_runtime.core.errors import CheckpointError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_FILES = ["*.json", "*.safetensors", "*.jinja"]
_TOKENIZER_FILES = ["*.json", "*.jinja"]


def locate_checkpoint(model: str, *, weights: bool = True, show_progress: bool = False, option: str = "model") -> Path:
    """The local folder of `model`, a folder path or a hub id `owner/name`.

    weights: False fetches only configuration and tokenizer. option: what errors call it. Raises CheckpointError when
    there is no such folder, no such repository, or no way to reach it.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise CheckpointError(f"{option}: found the file {model!r}, allowed: a checkpoint folder or owner/name")
    if not _HUB_ID.fullmatch(model):
        allowed = "a checkpoint folder or owner/name"
        raise CheckpointError(f"{option}: found {model!r}, which is no folder; allowed: {allowed}")

    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled
    from huggingface_hub.utils import tqdm

    class QuietBar(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "disable": True})

    try:
        patterns = _FILES if weights else _TOKENIZER_FILES
        bar = None if show_progress else QuietBar
        return Path(snapshot_download(model, allow_patterns=patterns, tqdm_class=bar))
    except (LocalEntryNotFoundError, OfflineModeIsEnabled):
        raise CheckpointError(
            f"{option}: {model!r} is neither a local folder nor in the local hub cache, and the hub cannot be reached; "
            "give the path of a checkpoint folder"
        ) from None
    except HfHubHTTPError as error:
        raise CheckpointError(f"{option}: {model!r} cannot be fetched: {str(error).splitlines()[0]}") from None
    except OSError as error:
        raise CheckpointError(f"{option}: {model!r} cannot be fetched: {error}") from None
