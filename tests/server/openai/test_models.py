"""The model list, and which names mean the served model."""

from __future__ import annotations

import openai
import pytest

from tests.server.app_server import AppServer


def test_one_model(client: openai.OpenAI, bundled: str) -> None:
    [card] = client.models.list().data
    assert (card.id, card.owned_by) == (bundled, "sglang")
    assert client.models.retrieve(bundled) == card
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("other")
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


@pytest.mark.parametrize("name", [None, "", "unknown", "default"])
def test_names_that_mean_any_model(client: openai.OpenAI, bundled: str, name: str | None) -> None:
    answer = client.completions.create(model=name, prompt="fox", max_tokens=1)  # type: ignore[arg-type]
    assert answer.model == bundled
    answer = client.completions.create(model=bundled, prompt="fox", max_tokens=1)
    assert answer.model == bundled


@pytest.mark.parametrize("route", ["completions", "chat/completions"])
def test_other_names_are_not_found(client: openai.OpenAI, route: str) -> None:
    body = {"model": "other", "prompt": "fox", "messages": [{"role": "user", "content": "fox"}]}
    with pytest.raises(openai.NotFoundError, match="there is no model 'other'"):
        client.post(f"/{route}", body=body, cast_to=object)


def test_a_name_of_ones_own(bundled: str) -> None:
    with AppServer(bundled, served_model_name="fox") as server:
        base = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        with base as client:
            assert [m.id for m in client.models.list().data] == ["fox"]
            for name in ("fox", bundled):
                assert client.completions.create(model=name, prompt="a", max_tokens=1).model == name
