"""Asks one engine: every question of a document with every setting, together, over a prefix that is stored once.

Knows no statistics and no files.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from benchmarks.quality.samples import Asked
from benchmarks.quality.settings import Decoding, Setting
from losa_runtime import LLM, SamplingParams
from losa_runtime.core.batch import SparseParams
from losa_runtime.core.request import RequestStats
from losa_runtime.core.sampling_params import DiffusionParams
from losa_runtime.sparse.method import METHODS
from losa_runtime.sparse.resolve import resolve

NEW_TOKENS = 32  # the longest answer has 16 with its end
RUNNING = 64
_BLOCKS_PER_REQUEST = 4  # of its own: the rest of the prompt, and up to two blocks of answer


class Answer(NamedTuple):
    """One question answered with one setting."""

    right: bool
    text: str
    stats: RequestStats


class Runner:
    """One engine for all settings. by_name: its pages also keep what merely saves a method reads."""

    def __init__(
        self, model: str, context: int, page_size: int = 16, running: int = RUNNING, by_name: bool = False
    ) -> None:
        probe = 16 if page_size < 16 else page_size
        own = running * _BLOCKS_PER_REQUEST * probe
        self.llm = LLM(
            model=model,
            page_size=page_size,
            max_running_requests=running,
            max_total_tokens=2 * (context + own),
            chunked_prefill_size=2048,
            sparse_methods=tuple(METHODS) if by_name else None,
            deterministic=True,  # a row does not depend on which other settings were measured beside it
        )

    @property
    def block_length(self) -> int:
        """Of the model."""
        return self.llm.engine.parts.model_config.block_length

    def resolve(self, setting: Setting, decoding: Decoding) -> SparseParams:
        """What the engine makes of a setting. Raises InvalidRequest for one that it cannot serve."""
        engine = self.llm.engine
        return resolve(setting.params(decoding), engine.config, engine.parts.geometry)

    def ask(self, document: Asked, settings: Sequence[Setting], decoding: Decoding) -> list[list[Answer]]:
        """Answers per setting, in the order of the document's questions."""
        prompts = [self.llm.tokenizer.encode(prompt) for prompt in document.prompts]  # once, not for each setting
        # Every prompt's whole blocks are in the cache before the settings compete for the running slots.
        self.llm.generate(prompts, _params(DiffusionParams(), 0))
        asked = [(prompt, _params(setting.params(decoding), NEW_TOKENS)) for setting in settings for prompt in prompts]
        outputs = iter(self.llm.generate([prompt for prompt, _ in asked], [params for _, params in asked]))
        found = []
        for _ in settings:
            answers = []
            for question in document.questions:
                output = next(outputs)
                assert output.finish.type in ("stop", "length"), output.finish
                answers.append(Answer(output.text.strip() == question.answer, output.text, output.stats))
            found.append(answers)
        return found


def _params(wanted: DiffusionParams, tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_new_tokens=tokens, custom_params=wanted)
