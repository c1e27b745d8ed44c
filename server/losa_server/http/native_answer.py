"""One generation as the JSON object of SGLang's native API. Everything in it so far is final; text only grows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from losa_runtime.core.request import FinishReason
from losa_server.request_manager import Generation, TokenizerFace

WEIGHT_VERSION = "default"


def native_answer(
    generation: Generation, tokenizer: TokenizerFace, with_logprobs: bool, with_texts: bool
) -> dict[str, Any]:
    """`{"text", "output_ids", "meta_info"}`. Log-probability entries are `[logprob, token_id, text or null]`."""
    answer = generation.answer
    meta = _meta_info(generation)
    if with_logprobs:
        start = generation.ask.score_start or 0
        scored = generation.prompt_ids[start : start + len(answer.prompt_logprobs)]
        meta["input_token_logprobs"] = _entries(answer.prompt_logprobs, scored, tokenizer, with_texts)
        meta["output_token_logprobs"] = _entries(answer.output_logprobs, answer.token_ids, tokenizer, with_texts)
        meta["output_token_logprobs_length"] = len(answer.output_logprobs)
    return {"text": answer.text, "output_ids": answer.token_ids, "meta_info": meta}


def _meta_info(generation: Generation) -> dict[str, Any]:
    answer = generation.answer
    stats = answer.stats
    meta: dict[str, Any] = {
        "id": generation.label,
        "finish_reason": None if answer.finish is None else finish_reason(answer.finish),
        "prompt_tokens": answer.prompt_tokens,
        "completion_tokens": answer.completion_tokens,
        "cached_tokens": answer.cached_tokens,
        "weight_version": WEIGHT_VERSION,
        "num_retractions": stats.retractions,
        "forwards": stats.forwards,
        "blocks": stats.blocks,
        "denoise_steps": stats.denoise_steps,
        "dense_steps": stats.dense_steps,
        "tokens_per_forward": answer.completion_tokens / stats.forwards if stats.forwards else None,
        "tokens_per_step": answer.completion_tokens / stats.denoise_steps if stats.denoise_steps else None,
        "kv_density": stats.kv_density,
        "kv_density_q": stats.kv_density_q,
        "active_share": stats.active_share,
        "active_overlap": stats.active_overlap,
        "kv_bytes": stats.kv_bytes,
        "metadata_bytes": stats.metadata_bytes,
        "dense_bytes": stats.dense_bytes,
        "bytes_ratio": stats.bytes_ratio,
        "block_bytes_ratio": stats.block_bytes_ratio,
    }
    if generation.seconds is not None:
        meta["e2e_latency"] = generation.seconds
    return meta


def finish_reason(finish: FinishReason) -> dict[str, Any]:
    """SGLang's finish reason: only the fields that apply."""
    return finish.model_dump(exclude_none=True)


def _entries(
    values: Sequence[float], ids: Sequence[int], tokenizer: TokenizerFace, with_texts: bool
) -> list[list[Any]]:
    return [
        [value, token_id, tokenizer.token_text(token_id) if with_texts else None]
        for value, token_id in zip(values, ids, strict=False)
    ]
