"""An engine without a model: it answers with the prompt itself, four tokens per step. Loads no torch.

Words in the prompt make it misbehave: RAISE (a step raises), REFUSE (add raises), EXIT (the process ends), HANG (no
progress, until aborted), STICK (a step never ends), SLOW (50 ms per step), GATE (a step lasts until `gate` is set).
"""

from __future__ import annotations

import os
import threading
import time

from losa_runtime.core.config import EngineConfig
from losa_runtime.core.errors import ConfigError, InvalidRequest, QueueFull
from losa_runtime.core.request import Alternatives, FinishReason, Request, RequestOutput, RequestStats, StepTrace
from losa_runtime.text_stream import TextStream
from losa_runtime.tokenizer import Detokenizer, Tokenizer

BLOCK = 4
CONTEXT = 4096


class _Live:
    def __init__(self, request: Request, text: str, stream: TextStream) -> None:
        self.request, self.text, self.stream = request, text, stream
        self.made = 0
        self.steps = 0


class FakeEngine:
    """The engine's face over an echo."""

    def __init__(self, config: EngineConfig) -> None:
        if config.sparse_method == "broken":
            raise ConfigError("sparse_method: found 'broken', allowed: dense, quest, losa")
        if config.sparse_method == "raise":
            raise RuntimeError("boom while loading")
        self.config = config
        self.tokenizer = Tokenizer(config.model)
        self.live: dict[str, _Live] = {}
        self.ended: list[RequestOutput] = []
        self.aborted = self.added = self.forwards = 0
        self.seen: list[Request] = []
        self.gate, self.waits_at_gate = threading.Event(), False
        self.cached: set[str] = set()

    def add(self, request: Request) -> None:
        text = self.tokenizer.decode(request.prompt_ids, skip_special_tokens=False)
        if "REFUSE" in text:
            raise RuntimeError("boom while adding")
        limit = request.sampling.max_new_tokens
        if not request.prompt_ids and limit != 0:
            raise InvalidRequest("prompt", "no tokens", "at least one token")
        if len(request.prompt_ids) + (limit or 0) > CONTEXT:
            raise InvalidRequest("prompt", f"{len(request.prompt_ids)} tokens", f"at most {CONTEXT} tokens")
        if request.score is not None and request.score.start > len(request.prompt_ids):
            raise InvalidRequest("logprob_start_len", request.score.start, f"at most {len(request.prompt_ids)}")
        if len(self.live) >= self.config.max_queued_requests:
            raise QueueFull("the queue is full")
        detokenizer = Detokenizer(self.tokenizer, request.sampling.skip_special_tokens)
        stream = TextStream(detokenizer, request.sampling.stop, request.sampling.no_stop_trim)
        self.live[request.rid] = _Live(request, text, stream)
        self.added += 1
        self.seen.append(request)

    def abort(self, rid: str) -> bool:
        live = self.live.pop(rid, None)
        if live is None:
            return False
        self.aborted += 1
        self.ended.append(self._output(live, (), "", FinishReason(type="abort", message="aborted")))
        return True

    @property
    def queued(self) -> int:
        return len(self.live)

    def rest(self) -> None:
        assert not self.live

    def has_work(self) -> bool:
        return bool(self.live or self.ended)

    def step(self) -> list[RequestOutput]:
        outputs, self.ended = self.ended, []
        for live in list(self.live.values()):
            output = self._advance(live)
            if output is None:
                continue
            outputs.append(output)
            if output.finish is not None:
                del self.live[live.request.rid]
        return outputs

    def flush_cache(self) -> bool:
        self.cached = set() if not self.live else self.cached
        return not self.live

    def info(self) -> dict[str, object]:
        return {
            "model_path": self.config.model,
            "tokenizer_path": self.config.model,
            "architecture": "Fake",
            "context_length": CONTEXT,
            "block_length": BLOCK,
            "page_size": self.config.page_size,
            "vocab_size": self.tokenizer.vocab_size,
            "mask_token_id": self.tokenizer.mask_token_id,
            "max_total_tokens": 65536,
            "max_queued_requests": self.config.max_queued_requests,
            "page_bytes": 2**18,
            "sparse_method": self.config.sparse_method,
        }

    def stats(self) -> dict[str, object]:
        return {
            "running": len(self.live),
            "waiting": 0,
            "aborted": self.aborted,
            "prompt_tokens": 100 * self.added,
            "cached_tokens": 25 * self.added,
            "pages_total": 4096,
            "pages_free": 4000,
            "pages_evictable": 64,
            "pages_evicted": 7,
            "retractions": 3,
            "retracted": 1,
            "forwards": 5 * self.added,
            "rows": {"prefill": 100, "commit": 16, "open": 16, "denoise": 60, "score": 8},
            "denoise_steps": 9,
            "kv_bytes": 5 * 2**20,
            "dense_bytes": 20 * 2**20,
            "metadata_bytes": 2**20,
            "added": self.added,
            "pid": os.getpid(),
        }

    def _advance(self, live: _Live) -> RequestOutput | None:
        request = live.request
        if "RAISE" in live.text:
            raise RuntimeError("boom in a step")
        if "EXIT" in live.text:
            os._exit(9)
        if "STICK" in live.text:
            time.sleep(1000)
        if "HANG" in live.text:
            time.sleep(0.005)
            return None
        if "GATE" in live.text:
            self.waits_at_gate = True
            self.gate.wait(20)
        self.forwards += 1
        if "SLOW" in live.text:
            time.sleep(0.05)
        live.steps += 1
        wanted = 128 if request.sampling.max_new_tokens is None else request.sampling.max_new_tokens
        ids = [
            request.prompt_ids[(live.made + i) % len(request.prompt_ids)] for i in range(min(BLOCK, wanted - live.made))
        ]
        last = live.made + len(ids) >= wanted
        text, used, matched = live.stream.push(ids, final=last)
        finish: FinishReason | None = None
        if matched is not None:
            ids, finish = ids[:used], FinishReason(type="stop", matched=matched)
        elif last:
            finish = FinishReason(type="length", length=wanted)
        live.made += len(ids)
        return self._output(live, tuple(ids), text, finish)

    def _others(self, request: Request, token: int) -> Alternatives:
        """The token itself at -0.5, the ids behind it at -1.5, -2.5, …; of the asked ids only the token is possible."""
        top = range(request.top_logprobs)
        asked = tuple(-0.5 if i == token else float("-inf") for i in request.logprob_ids)
        return Alternatives(tuple(token + i for i in top), tuple(-0.5 - i for i in top), asked)

    def _output(self, live: _Live, ids: tuple[int, ...], text: str, finish: FinishReason | None) -> RequestOutput:
        request = live.request
        scores: tuple[float, ...] | None = None
        if finish is not None and request.score is not None:
            prompt = request.prompt_ids
            # A token that came before is likely, a new one is not, an "!" impossible.
            scores = tuple(
                float("-inf")
                if self.tokenizer.token_text(prompt[i]) == "!"
                else 0.0
                if prompt[i] in prompt[:i]
                else -2.0
                for i in range(request.score.start, len(prompt))
            )
        start, others = live.made - len(ids), request.top_logprobs > 0 or bool(request.logprob_ids)
        step = StepTrace(start, live.made, 0, tuple(range(start, live.made)), ids, tuple(-0.5 for _ in ids))
        return RequestOutput(
            rid=request.rid,
            text=text,
            token_ids=ids,
            output_logprobs=tuple(-0.5 for _ in ids) if request.output_logprobs else None,
            output_alternatives=tuple(self._others(request, i) for i in ids) if others else None,
            prompt_alternatives=tuple(self._others(request, i) for i in request.prompt_ids[request.score.start :])
            if others and scores is not None and request.score is not None
            else None,
            trace=(step,) if request.trace and ids else (),
            prompt_logprobs=scores,
            finish=finish,
            prompt_tokens=len(request.prompt_ids),
            completion_tokens=live.made,
            stats=RequestStats(forwards=live.steps, denoise_steps=live.steps, kv_density=0.25, active_share=0.5),
        )
