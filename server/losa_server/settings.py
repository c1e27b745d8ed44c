"""What is fixed for the life of the HTTP process, and what a client of it has to know."""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, SecretStr

from losa_runtime.core.options import option
from losa_server.logs import LogFormat

SERVER = "server"
ACCESS = "access"
OBSERVATION = "observation"
LIMITS = "limits"
CONNECTION = "connection"


class ServerSettings(BaseModel):
    """A field that is declared with `option` is a flag of `losa serve`, a LOSA_… variable and a key of its YAML file;
    nothing else has to be written for it.

    long_text: characters from which tokenizing leaves the event loop. shutdown_s: seconds that finished answers get to
    reach their clients at the end.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    host: str = option("127.0.0.1", SERVER, "address to listen on")
    port: int = option(30000, SERVER, "port to listen on; 0 takes a free one", ge=0, le=65535)
    served_model_name: str | None = option(
        None, SERVER, "id under /v1/models (default: the model's path)", metavar="NAME"
    )
    drain_timeout: float = option(
        25.0, SERVER, "seconds that accepted requests get to finish when the server is asked to end", ge=0
    )
    heartbeat_timeout: float = option(
        4.0, SERVER, "seconds without a sign of life after which the engine process is replaced", ge=0.5
    )
    watchdog_timeout: float = option(300.0, SERVER, "longest forward, in seconds, before the engine is replaced", gt=0)
    max_restarts: int = option(3, SERVER, "engines replaced within a minute; one more ends the server", ge=0)

    api_key: SecretStr | None = option(
        None, ACCESS, "key that clients must send; best given as LOSA_API_KEY, as other users can see command lines"
    )
    admin_api_key: SecretStr | None = option(
        None, ACCESS, "key for managing (flush, abort all, profile, settings); without it the only other key may manage"
    )
    api_key_file: Path | None = option(
        None, ACCESS, "file with lines name:key or name:key:salt; names share no cached prefixes, salts do"
    )
    allowed_origins: tuple[str, ...] = option(
        (), ACCESS, "pages of other sites that may use the server from a browser, e.g. https://lab.example"
    )

    log_level: Literal["debug", "info", "warning", "error"] = option("info", OBSERVATION, "what is logged")
    log_format: LogFormat = option("text", OBSERVATION, "log lines for people, or a JSON object per line")
    log_requests: bool = option(True, OBSERVATION, "log a line per request: counts and times, never its text")
    enable_metrics: bool = option(True, OBSERVATION, "offer /metrics for Prometheus")
    otlp_endpoint: str | None = option(
        None, OBSERVATION, "send a trace span per request to this URL, e.g. http://host:4318/v1/traces", metavar="URL"
    )

    max_body_bytes: int = option(32 * 2**20, LIMITS, "largest body of one HTTP request", gt=0)
    max_header_bytes: int = option(32 * 2**10, LIMITS, "largest head of one HTTP request", ge=1024)
    max_headers: int = option(100, LIMITS, "header lines of one HTTP request", gt=0)
    max_prompts: int = option(512, LIMITS, "prompts of one call, times n", gt=0)
    max_prompt_chars: int | None = option(
        None, LIMITS, "longest prompt as text, in characters (default: 16 for each token of the context)", gt=0
    )
    head_timeout: float = option(30.0, LIMITS, "seconds in which the head of a request must arrive", gt=0)
    body_timeout: float = option(120.0, LIMITS, "seconds in which the body of a request must arrive", gt=0)
    stall_timeout: float = option(60.0, LIMITS, "seconds that a client may leave an answer unread", gt=0)
    max_score_tokens: int = option(
        32768, LIMITS, "prompt tokens that one call may have scored (select, return_logprob); each costs a block", gt=0
    )
    chat_template_timeout: float = option(10.0, LIMITS, "seconds that rendering one conversation may take", gt=0)
    long_text: int = Field(default=4000, gt=0)
    shutdown_s: float = Field(default=3.0, ge=0)

    @property
    def local(self) -> bool:
        """True when only this machine can reach the port."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"


class ClientSettings(BaseModel):
    """How commands that talk to a server reach it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    url: str | None = option(
        None, CONNECTION, "a running server; without it, --model-path says what to start", metavar="URL"
    )
    api_key: SecretStr | None = option(None, CONNECTION, "the key that it wants, best given as LOSA_API_KEY")
