"""OpenAI's own client against the echo engine."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from tests.server.app_server import AppServer

# Shows what a template is given: messages as they are, tools as JSON, a switch.
TEMPLATE = (
    "{% if enable_thinking %}thinking {% endif %}{% if tools %}{{ tools | length }} tools {% endif %}"
    "{% for m in messages %}{{ m.content }}{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}{% endfor %}"
)


def client_of(server: AppServer) -> openai.OpenAI:
    """A client that repeats nothing."""
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60)


def with_template(bundled: str, folder: Path, template: str | None) -> str:
    """The bundled tokenizer with another chat template, or none."""
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(Path(bundled) / name, folder / name)
    settings = json.loads((Path(bundled) / "tokenizer_config.json").read_text())
    settings["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return str(folder)


@pytest.fixture
def client(server: AppServer) -> Iterator[openai.OpenAI]:
    """A client of the shared server, whose template is the bundled one."""
    with client_of(server) as made:
        yield made


@pytest.fixture(scope="module")
def tool_server(bundled: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[AppServer]:
    """A server whose template knows tools and a switch, and adds no special tokens."""
    with AppServer(with_template(bundled, tmp_path_factory.mktemp("tools"), TEMPLATE)) as running:
        yield running


@pytest.fixture
def tool_client(tool_server: AppServer) -> Iterator[openai.OpenAI]:
    """Its client."""
    with client_of(tool_server) as made:
        yield made
