"""What is fixed for the life of the HTTP process: where it listens and how much it takes from one client."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from losa_runtime.core.options import option

SERVER = "server"
LIMITS = "limits"


class ServerSettings(BaseModel):
    """A field that is declared with `option` is a flag of `losa serve`, a LOSA_… variable and a key of its YAML file;
    nothing else has to be written for it.

    long_text: characters from which tokenizing leaves the event loop.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    host: str = option("127.0.0.1", SERVER, "address to listen on")
    port: int = option(30000, SERVER, "port to listen on; 0 takes a free one", ge=0, le=65535)
    served_model_name: str | None = option(
        None, SERVER, "id under /v1/models (default: the model's path)", metavar="NAME"
    )
    log_level: Literal["debug", "info", "warning", "error"] = option("info", SERVER, "what is logged")
    shutdown_s: float = option(3.0, SERVER, "seconds that open connections get when the server is asked to end", ge=0)

    max_body_bytes: int = option(32 * 2**20, LIMITS, "largest body of one HTTP request", gt=0)
    max_prompts: int = option(1024, LIMITS, "prompts of one call, times n", gt=0)
    long_text: int = Field(default=4000, gt=0)
