"""A server as partner, through OpenAI's API, which other servers have as well. Knows no model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any, Self

import httpx
import orjson

from losa_server.chat.partner import Message, NoAnswer
from losa_server.chat.settings import ChatSettings

SILENCE_S = 600.0


class RemotePartner:
    """See Partner. Raises NoAnswer from entry if there is no such server."""

    def __init__(self, url: str, api_key: str | None, settings: ChatSettings) -> None:
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        timeout = httpx.Timeout(SILENCE_S, connect=10.0)
        self._http = httpx.Client(base_url=url, headers=headers, timeout=timeout, trust_env=False)
        self._url, self._settings = url, settings
        self.name = ""
        self.cost: dict[str, Any] = {}

    def __enter__(self) -> Self:
        try:
            reply = self._http.get("/v1/models")
            _check(reply)
            self.name = str(orjson.loads(reply.content)["data"][0]["id"])
        except httpx.HTTPError as error:
            raise NoAnswer(f"{self._url}: {_words(error)}") from None
        except (orjson.JSONDecodeError, LookupError, TypeError):
            raise NoAnswer(f"{self._url}: this server lists no model under /v1/models") from None
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._http.close()

    def answer(self, messages: Sequence[Message]) -> Iterator[str]:
        """See Partner."""
        self.cost = {}
        body = orjson.dumps(self._body(messages))
        headers = {"Content-Type": "application/json"}
        try:
            with self._http.stream("POST", "/v1/chat/completions", content=body, headers=headers) as reply:
                if reply.status_code != 200:
                    reply.read()
                _check(reply)
                for line in reply.iter_lines():
                    if line.startswith("data:") and line != "data: [DONE]":
                        yield from self._news(orjson.loads(line[5:]))
        except httpx.HTTPError as error:
            raise NoAnswer(f"{self._url}: {_words(error)}") from None

    def _body(self, messages: Sequence[Message]) -> dict[str, Any]:
        settings = self._settings
        body: dict[str, Any] = {
            "model": self.name,
            "messages": messages,
            "stream": True,
            "stream_options": {"include_usage": True},
            "return_meta_info": True,
            "temperature": settings.temperature,
            "top_p": settings.top_p,
            "max_tokens": settings.max_new_tokens,
            "seed": settings.sampling_seed,
            "custom_params": settings.custom_params,
        }
        return {name: value for name, value in body.items() if value not in (None, {})}

    def _news(self, chunk: dict[str, Any]) -> Iterator[str]:
        if "error" in chunk:
            raise NoAnswer(_message(chunk))
        usage = chunk.get("usage") or {}
        if usage:
            cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")
            counts = {"prompt_tokens": usage["prompt_tokens"], "completion_tokens": usage["completion_tokens"]}
            self.cost |= counts if cached is None else {**counts, "cached_tokens": cached}
        for choice in chunk.get("choices", []):
            self.cost |= choice.get("meta_info") or {}
            if choice.get("finish_reason"):
                self.cost["ended_by"] = choice["finish_reason"]
            yield from filter(None, [choice["delta"].get("content")])


def _check(reply: httpx.Response) -> None:
    if reply.status_code == 200:
        return
    try:
        message = _message(orjson.loads(reply.content))
    except orjson.JSONDecodeError:
        message = reply.text[:500]
    raise NoAnswer(f"{reply.url} answered {reply.status_code}: {message}")


def _message(body: Any) -> str:
    error = body.get("error", body) if isinstance(body, dict) else body
    return str(error["message"] if isinstance(error, dict) and "message" in error else error)


def _words(error: httpx.HTTPError) -> str:
    return f"{type(error).__name__}: {error}".strip(": ")
