"""What is fixed for the life of the HTTP process: where it listens and how much it takes from one client."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class ServerSettings(BaseModel):
    """served_model_name: id under /v1/models; None means the model path. max_body_bytes: of one HTTP request.
    max_prompts: prompts of one call, times n. long_text: characters from which tokenizing leaves the event loop.
    shutdown_s: seconds that open connections get when the server is asked to end."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    host: str = "127.0.0.1"
    port: int = Field(default=30000, ge=0, le=65535)
    served_model_name: str | None = None
    log_level: str = "info"
    max_body_bytes: int = Field(default=32 * 2**20, gt=0)
    max_prompts: int = Field(default=1024, gt=0)
    long_text: int = Field(default=4000, gt=0)
    shutdown_s: float = Field(default=3.0, ge=0)
