"""Servers that are already running, by URL: what speaks SGLang's native API or OpenAI's completions can be a peer.

Every prompt is a call of its own, all at once, as clients would. Model, threads and decoding settings of a server are
its own affair; that it answers the same is proven like everybody else's. Knows the two bodies, nothing of the server.
"""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import httpx

from benchmarks.peers.peer import Answer, Peer, Prompt, Task

TIMEOUT_S = 600.0
T = TypeVar("T")


class ServerError(Exception):
    """A server did not answer as its API says; the message has its words."""


class ServerPeer(Peer):
    """extra: further fields of every body, the server's own knobs."""

    def __init__(self, name: str, url: str, extra: dict[str, Any] | None = None, key: str | None = None) -> None:
        self.name, self.extra = name, extra or {}
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        # No limit of its own on connections: a queue here would be taken for one there.
        limits = httpx.Limits(max_connections=None)
        self.client = httpx.Client(base_url=url.rstrip("/"), headers=headers, timeout=TIMEOUT_S, limits=limits)

    def answer(self, prompts: Sequence[Prompt], task: Task) -> list[Answer]:
        with ThreadPoolExecutor(len(prompts)) as pool:
            return list(pool.map(lambda prompt: self._one(prompt, task), prompts))

    def close(self) -> None:
        self.client.close()

    @abstractmethod
    def _one(self, prompt: Prompt, task: Task) -> Answer: ...

    def _ask(self, path: str, body: dict[str, Any] | None = None, method: str = "POST") -> httpx.Response:
        try:
            reply = self.client.request(method, path, json=body)
        except httpx.HTTPError as error:
            raise ServerError(f"{self.name}: {path}: {type(error).__name__}: {error}") from None
        if reply.status_code != httpx.codes.OK:
            raise ServerError(f"{self.name}: {path}: {reply.status_code}: {reply.text[:500]}")
        return reply

    def _read(self, reply: httpx.Response, read: Callable[[Any], T]) -> T:
        """What `read` finds in the JSON of a reply. Raises ServerError if it is not there."""
        try:
            return read(reply.json())
        except (ValueError, LookupError, TypeError) as error:
            why = f"{type(error).__name__}: {error}"
            raise ServerError(f"{self.name}: {reply.url.path}: {why}, in {reply.text[:500]!r}") from None


class SGLangPeer(ServerPeer):
    """`POST /generate` with token ids; `POST /flush_cache` makes it forget."""

    def reset(self) -> None:
        self._ask("/flush_cache")

    def _one(self, prompt: Prompt, task: Task) -> Answer:
        sampling = {"temperature": 0, "max_new_tokens": task.max_new_tokens, "ignore_eos": task.ignore_stops}
        sampling |= self.extra.get("sampling_params", {})
        rest = {name: value for name, value in self.extra.items() if name != "sampling_params"}
        reply = self._ask("/generate", {"input_ids": list(prompt), "sampling_params": sampling, **rest})
        return self._read(reply, _native_answer)


class OpenAIPeer(ServerPeer):
    """`POST /v1/completions` with token ids. The API has no word for forgetting: prefixes may be cached from run to
    run."""

    cold = False

    def __init__(self, name: str, url: str, extra: dict[str, Any] | None = None, key: str | None = None) -> None:
        super().__init__(name, url, extra, key)
        self._model: str | None = None

    def _one(self, prompt: Prompt, task: Task) -> Answer:
        body = {"prompt": list(prompt), "max_tokens": task.max_new_tokens, "temperature": 0, **self.extra}
        if task.ignore_stops:
            body["ignore_eos"] = True
        reply = self._ask("/v1/completions", {"model": self._name_of_model(), **body})
        return self._read(reply, lambda found: Answer(found["usage"]["completion_tokens"], None, _text(found)))

    def _name_of_model(self) -> str:
        if self._model is None:
            reply = self._ask("/v1/models", method="GET")
            self._model = self._read(reply, lambda found: str(found["data"][0]["id"]))
        return self._model


def _native_answer(found: Any) -> Answer:
    ids = found.get("output_ids")
    return Answer(found["meta_info"]["completion_tokens"], None if ids is None else tuple(ids), found["text"])


def _text(found: Any) -> str:
    text: str = found["choices"][0]["text"]
    return text


KINDS: dict[str, type[ServerPeer]] = {"sglang": SGLangPeer, "openai": OpenAIPeer}


def server_peer(text: str, extra: str | None = None, key: str | None = None) -> ServerPeer:
    """`KIND=URL` as a peer. Raises ValueError that says what is allowed."""
    kind, _, url = text.partition("=")
    if kind not in KINDS or not url.startswith(("http://", "https://")):
        raise ValueError(f"found {text!r}, allowed: KIND=URL with KIND one of {', '.join(KINDS)} and an http URL")
    fields = {} if extra is None else json.loads(extra)
    if not isinstance(fields, dict):
        raise ValueError(f"further fields: found {extra!r}, allowed: a JSON object")
    return KINDS[kind](f"{kind} {url}", url, fields, key)
