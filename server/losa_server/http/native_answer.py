"""One generation as the JSON object of SGLang's native API. Everything in it so far is final; text only grows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from losa_runtime.core.request import Alternatives, FinishReason
from losa_server.request_manager import Generation, TokenizerFace

WEIGHT_VERSION = "default"


Entry = list[Any]  # [logprob, token_id, text or null]


def native_answer(
    generation: Generation, tokenizer: TokenizerFace, with_texts: bool, with_prompt_ids: bool
) -> dict[str, Any]:
    """`{"text", "output_ids", "meta_info"}`. Log-probability entries are `[logprob, token_id, text or null]`,
    with null for the log-probability of a prompt's first token that has none, and for its alternatives."""
    answer = generation.answer
    meta = meta_info(generation)
    if generation.ask.output_logprobs:
        meta |= _logprobs(generation, tokenizer, with_texts)
    reply = {"text": answer.text, "output_ids": answer.token_ids, "meta_info": meta}
    return {**reply, "prompt_token_ids": list(generation.prompt_ids)} if with_prompt_ids else reply


def _logprobs(generation: Generation, tokenizer: TokenizerFace, with_texts: bool) -> dict[str, Any]:
    ask, answer = generation.ask, generation.answer

    def entries(values: Sequence[float | None], ids: Sequence[int]) -> list[Entry]:
        pairs = zip(values, ids, strict=False)
        return [[value, token, tokenizer.token_text(token) if with_texts else None] for value, token in pairs]

    start = ask.score_start or 0
    scored = generation.prompt_ids[start : start + len(answer.prompt_logprobs)]
    meta: dict[str, Any] = {
        "input_token_logprobs": entries(answer.prompt_logprobs, scored),
        "output_token_logprobs": entries(answer.output_logprobs, answer.token_ids),
        "output_token_logprobs_length": len(answer.output_logprobs),
    }
    inputs, outputs = answer.prompt_alternatives, answer.output_alternatives
    sides: dict[str, Sequence[Alternatives | None]] = {"input": inputs, "output": outputs}
    for side, others in sides.items():
        if ask.top_logprobs:
            meta[f"{side}_top_logprobs"] = [None if o is None else entries(o.top_logprobs, o.top_ids) for o in others]
        if ask.logprob_ids:
            meta[f"{side}_token_ids_logprobs"] = [
                None if o is None else entries(o.asked, ask.logprob_ids) for o in others
            ]
    return meta


def meta_info(generation: Generation) -> dict[str, Any]:
    """What a request has cost so far, and how it ended."""
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
