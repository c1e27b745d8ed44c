"""How a chat answers."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict

from losa_runtime.core.options import option

CHAT = "chat"


class ChatSettings(BaseModel):
    """custom_params: see DiffusionParams; they are sent as they are and judged by whoever answers."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    system: str | None = option(None, CHAT, "instruction that comes first in every conversation")
    max_new_tokens: int | None = option(None, CHAT, "longest answer (default: what the context leaves)", gt=0)
    temperature: float = option(0.0, CHAT, "0 is greedy", ge=0)
    top_p: float = option(1.0, CHAT, "share of the likeliest tokens that are drawn from", gt=0, le=1)
    sampling_seed: int | None = option(None, CHAT, "for answers that can be had again", ge=0)
    custom_params: dict[str, Any] = option(
        {}, CHAT, 'sparse attention and decoding of this chat, e.g. \'{"sparse_method": "losa"}\''
    )
