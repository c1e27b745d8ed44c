"""Which way of filling a block answers better, where the model is not sure and the right answer is in the grammar.

Two tasks for the bundled model. *codes*: questions for several codes, behind attention that reads too little of the
document (QUEST with a small budget), so that many answers are wrong; right is what names the right codes. *sentences*:
the document is to go on with one sentence of a given form; the measure is what the model itself gives the sentence as
written from left to right, per token. In both modes (questions also free), with several numbers of denoising steps per
block, with as many as the model's confidence asks for, and drawn at temperature 1. Knows no table and no file.
"""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Callable
from typing import Any

from benchmarks.quality.samples import Asked, documents
from losa_runtime.core.request import Request, ScoreSpec
from losa_runtime.core.sampling_params import SamplingParams
from losa_runtime.engine import Engine

CODES = "[0-9]{4}(?:, [0-9]{4}){0,3}"
SENTENCE = r" ?[A-Z][a-z]+(?: [a-z]+){8,14}\."
MODES = ("map", "valid")
PACES: dict[str, dict[str, Any]] = {
    "2 steps": {"algorithm": "low_confidence_static", "denoising_steps": 2},
    "4 steps": {"algorithm": "low_confidence_static", "denoising_steps": 4},
    "8 steps": {"algorithm": "low_confidence_static", "denoising_steps": 8},
    "dynamic": {"algorithm": "low_confidence_dynamic"},
    "drawn": {"algorithm": "low_confidence_static", "denoising_steps": 4},
}
BLURRED = {"sparse_method": "quest", "token_budget": 32}
CODE = re.compile("[0-9]{4}")
TOGETHER = 4


def answers(engine: Engine, context: int, samples: int, tick: Callable[[], None]) -> list[dict[str, Any]]:
    """A row per task, pace and mode. quality: of every answer, 1 or 0 (codes) or the log-probability per token."""
    rows = []
    asked = documents("multi_value", context, samples, TOGETHER, seed=0)
    for pace, custom in PACES.items():
        temperature = 1.0 if pace == "drawn" else 0.0
        for mode in (None, *MODES):
            wish: dict[str, Any] = {"temperature": temperature, "max_new_tokens": 48}
            form = {} if mode is None else {"grammar_mode": mode}
            wish |= {"regex": None if mode is None else CODES, "custom_params": custom | BLURRED | form}
            rows.append({"task": "codes", "pace": pace, "mode": mode} | _codes(engine, asked, wish))
            if mode is not None:
                wish |= {"regex": SENTENCE, "custom_params": custom | form, "max_new_tokens": 64}
                rows.append({"task": "sentences", "pace": pace, "mode": mode} | _sentences(engine, asked, wish))
            tick()
    return rows


def _codes(engine: Engine, asked: list[Asked], wish: dict[str, Any]) -> dict[str, Any]:
    quality: list[float] = []
    cost = _Cost()
    for document in asked:
        prompts = [tuple(engine.parts.tokenizer.encode(prompt)) for prompt in document.prompts]
        for (text, _), question in zip(cost.run(engine, prompts, wish), document.questions, strict=True):
            quality.append(float(CODE.findall(text) == CODE.findall(question.answer)))
    return {"quality": quality, **cost.figures()}


def _sentences(engine: Engine, asked: list[Asked], wish: dict[str, Any]) -> dict[str, Any]:
    quality: list[float] = []
    cost = _Cost()
    for document in asked:
        ids = engine.parts.tokenizer.encode(document.text)
        prompts = [tuple(ids[: len(ids) * (part + 1) // (TOGETHER + 1)]) for part in range(TOGETHER)]
        outputs = cost.run(engine, prompts, wish)
        for prompt, (_, tokens) in zip(prompts, outputs, strict=True):
            quality.append(_left_to_right(engine, prompt, tokens))
    return {"quality": quality, **cost.figures()}


def _left_to_right(engine: Engine, prompt: tuple[int, ...], tokens: tuple[int, ...]) -> float:
    """Log-probability per token behind a prompt, the end among them."""
    nothing = SamplingParams(max_new_tokens=0)
    spec = ScoreSpec(start=len(prompt))
    engine.add(Request(rid="score", prompt_ids=prompt + tokens, sampling=nothing, score=spec))
    while engine.has_work():
        for output in engine.step():
            if output.prompt_logprobs is not None:
                return statistics.fmean(output.prompt_logprobs)
    raise RuntimeError("a score that never came")


class _Cost:
    def __init__(self) -> None:
        self.cpu_s = 0.0
        self.steps = self.blocks = self.answers = 0

    def run(
        self, engine: Engine, prompts: list[tuple[int, ...]], wish: dict[str, Any]
    ) -> list[tuple[str, tuple[int, ...]]]:
        """Texts and tokens of some prompts, together."""
        began = time.process_time()
        for number, ids in enumerate(prompts):
            sampling = SamplingParams.parse(wish | {"sampling_seed": number})
            engine.add(Request(rid=str(number), prompt_ids=ids, sampling=sampling))
        texts = [""] * len(prompts)
        tokens: list[tuple[int, ...]] = [()] * len(prompts)
        while engine.has_work():
            for output in engine.step():
                texts[int(output.rid)] += output.text
                tokens[int(output.rid)] += output.token_ids
                if output.finish is not None:
                    self.steps += output.stats.denoise_steps
                    self.blocks += output.stats.blocks
        self.answers += len(prompts)
        self.cpu_s += time.process_time() - began
        return list(zip(texts, tokens, strict=True))

    def figures(self) -> dict[str, float]:
        """Denoising steps per block, and milliseconds of CPU per answer, prefill and all."""
        return {
            "steps_per_block": round(self.steps / self.blocks, 2),
            "cpu_ms_per_answer": round(self.cpu_s / self.answers * 1e3, 1),
        }
