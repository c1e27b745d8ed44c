"""The bundled model with and without 8-bit weights: right answers, logits, speed. Part of `benchmarks.quantization`.

Logits are those of the first step of an answer, a block of masks behind a whole prompt, from one plain forward with
dense attention, so nothing but the weights differs. Speed is that of some requests at once with a fixed number of
steps, in tokens per second of processor time, so that others on the machine disturb it little.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.tiny_model.evaluate import CHECKPOINT, NEW_TOKENS, prompts
from losa_runtime import LLM, SamplingParams
from losa_runtime.core.config import Quantization
from losa_runtime.core.model_config import ModelConfig
from losa_runtime.core.sampling_params import DiffusionParams
from losa_runtime.layers.attention import AttendFn
from losa_runtime.models.model import BlockDiffusionModel, load_model

KINDS: tuple[Quantization | None, ...] = (None, "int8", "fp8")
STEPS = 8  # per block, where speed is measured


def ticks(args: argparse.Namespace) -> int:
    """How often `measure` calls back."""
    return len(KINDS) * (args.samples * len(args.tasks) + args.rounds + 2)


def measure(args: argparse.Namespace, tick: Callable[[], None]) -> dict[str, Any]:
    """One row for all variants; `none` stands for full weights."""
    engines = {kind: LLM(model=str(CHECKPOINT), quantization=kind, show_progress=False) for kind in KINDS}
    wanted = _logits(args, None)
    found: dict[Quantization | None, dict[str, Any]] = {}
    for kind, llm in engines.items():
        right = {task: _right(llm, task, args, tick) / args.samples for task in args.tasks}
        error = _differences(_logits(args, kind), wanted)
        tick()
        found[kind] = {"weight_bytes": llm.engine.parts.info()["weight_bytes"], "right": right, "logits": error}
    speeds = _speeds(engines, args, tick)
    for kind, row in found.items():
        row["tokens_per_cpu_s"] = round(speeds[kind], 1)
        row["speed"] = round(speeds[kind] / speeds[None], 3)
    names = ("context", "samples", "logit_samples", "logit_context", "rounds", "threads", "requests", "output_tokens")
    fixed = {"steps": STEPS, "dtype": "float32"}
    variants = {kind or "none": row for kind, row in found.items()}
    return {"benchmark": "bundled", "variants": variants, **{n: getattr(args, n) for n in names}, **fixed}


def _right(llm: LLM, task: str, args: argparse.Namespace, tick: Callable[[], None]) -> int:
    asked, questions = prompts(task, args.context, args.samples)
    params, right = SamplingParams(temperature=0, max_new_tokens=NEW_TOKENS), 0
    for at in range(0, args.samples, args.requests):
        outputs = llm.generate(asked[at : at + args.requests], params)
        for output, question in zip(outputs, questions[at : at + args.requests], strict=True):
            right += output.text.strip() == question.answer
            tick()
    return right


def _logits(args: argparse.Namespace, kind: Quantization | None) -> Tensor:
    """[rows, V]: of a block of masks behind each prompt, cut to whole blocks."""
    config = ModelConfig.from_folder(CHECKPOINT)
    model = load_model(CHECKPOINT, config, torch.float32, "cpu", quantization=kind)
    tokenizer = _tokenizer()
    rows = []
    for task in args.tasks:
        for text in prompts(task, args.logit_context, args.logit_samples)[0]:
            ids = tokenizer.encode(text)
            ids = ids[len(ids) % config.block_length :]
            rows.append(_first_step(model, torch.tensor([*ids, *[config.mask_token_id] * config.block_length])))
    return torch.cat(rows)


def _tokenizer() -> Any:
    from losa_runtime.tokenizer import Tokenizer

    return Tokenizer(CHECKPOINT, ModelConfig.from_folder(CHECKPOINT).mask_token_id)


@torch.inference_mode()
def _first_step(model: BlockDiffusionModel, tokens_T: Tensor) -> Tensor:
    block = model.config.block_length
    hidden_TC = model(tokens_T, torch.arange(len(tokens_T)), _dense(len(tokens_T), block))
    return model.logits(hidden_TC[-block:])


def _dense(length: int, block: int) -> AttendFn:
    """Block-causal attention over exactly these tokens."""
    number = torch.arange(length) // block
    sees = number[:, None] >= number[None, :]

    def attend(layer: int, q_THD: Tensor, k_TGD: Tensor, v_TGD: Tensor) -> Tensor:
        q, k, v = (x.transpose(0, 1)[None] for x in (q_THD, k_TGD, v_TGD))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=sees, enable_gqa=True)[0].transpose(0, 1)

    return cast(AttendFn, attend)


def _differences(found: Tensor, wanted: Tensor) -> dict[str, float]:
    """Errors of logits, KL from the full weights' distribution (mean per row), share of other best tokens."""
    error = (found - wanted).abs()
    kl = F.kl_div(found.log_softmax(-1), wanted.log_softmax(-1), log_target=True, reduction="batchmean")
    other = (found.argmax(-1) != wanted.argmax(-1)).float().mean()
    return {
        "mean_error": round(float(error.mean()), 5),
        "max_error": round(float(error.max()), 4),
        "spread": round(float(wanted.std()), 4),
        "kl": float(f"{max(0.0, float(kl)):.3g}"),
        "other_choices": round(float(other), 4),
        "rows": len(found),
    }


def _speeds(
    engines: dict[Quantization | None, LLM], args: argparse.Namespace, tick: Callable[[], None]
) -> dict[Quantization | None, float]:
    """Median tokens per second of processor time, prefill from the cache."""
    asked = prompts(args.tasks[0], args.context, args.requests)[0]
    custom = DiffusionParams(algorithm="low_confidence_static", denoising_steps=STEPS)
    params = SamplingParams(temperature=0, max_new_tokens=args.output_tokens, ignore_eos=True, custom_params=custom)
    seconds: dict[Quantization | None, list[float]] = {kind: [] for kind in engines}
    for turn in range(args.rounds + 1):
        for kind, llm in engines.items():
            start = time.process_time()
            llm.generate(asked, params)
            seconds[kind] += [time.process_time() - start] if turn else []
            tick()
    return {kind: args.requests * args.output_tokens / statistics.median(each) for kind, each in seconds.items()}
