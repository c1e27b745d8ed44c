"""What goes into an engine and what comes out of it: plain frozen values, the same offline and over a socket."""

from __future__ import annotations

from typing import Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from losa_runtime.core.sampling_params import MAX_COUNT, SamplingParams

MAX_ALTERNATIVES = 128  # per token, of either kind: a request's answer stays within what one message carries


class ScoreSpec(BaseModel):
    """Ask for log-probabilities of prompt tokens (SGLang's `return_logprob` with `max_new_tokens` 0 and `select`).

    start: first prompt position to be scored. The score of token i is log p(x_i | all earlier blocks, the tokens
    before i in its own block, MASK from i to the end of the block): the chain rule from left to right inside a block.
    With shifted logits nothing speaks for token 0, whose score is None.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    start: int = Field(ge=0, le=MAX_COUNT)


class Request(BaseModel):
    """One prompt to complete. `rid` is unique among the live requests. `namespace` separates prefix caches.

    output_logprobs: also report the log-probability that each output token had in the denoising step in which it was
    accepted: natural, after penalties, bias, bans and temperature, before top_k, top_p and min_p.
    top_logprobs, logprob_ids: with every token that is reported, also those of so many likeliest ids, and of these ids,
    from the same distribution. trace: also report every denoising step as it happens. compiled: what
    `grammar.guide.compile_constraint` made of the sampling parameters, by whoever could afford to wait for it; without
    it the engine compiles them itself.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_bytes="base64", val_json_bytes="base64")
    rid: str
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams = SamplingParams()
    score: ScoreSpec | None = None
    output_logprobs: bool = False
    top_logprobs: int = Field(default=0, ge=0, le=MAX_ALTERNATIVES)
    logprob_ids: tuple[int, ...] = Field(default=(), max_length=MAX_ALTERNATIVES)
    trace: bool = False
    compiled: bytes | None = None
    namespace: str = ""
    priority: int = Field(default=0, ge=-MAX_COUNT, le=MAX_COUNT)


class FinishReason(BaseModel):
    """Why a request ended. matched: the stop string or stop token id. message/status_code: for abort and error."""

    model_config = ConfigDict(frozen=True)
    type: Literal["stop", "length", "abort", "error"]
    matched: str | int | None = None
    length: int | None = None
    message: str | None = None
    status_code: int | None = None


class Alternatives(NamedTuple):
    """What else was likely where a token was accepted (or scored). top_ids: likeliest first, equal ones in no
    particular order; asked: values of `Request.logprob_ids`, in their order. Minus infinity for what was banned."""

    top_ids: tuple[int, ...] = ()
    top_logprobs: tuple[float, ...] = ()
    asked: tuple[float, ...] = ()


class StepTrace(NamedTuple):
    """One denoising step of a block. Positions count output tokens from 0; the block's are start .. stop - 1.

    step: 0 opens the block, also when it is opened again after a retraction: what it held is then masked again.
    positions: those unmasked in this step, ascending, with their token_ids and logprobs. Nothing of a block is final
    before it is finished: behind a stop token it may be dropped.
    """

    start: int
    stop: int
    step: int
    positions: tuple[int, ...]
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]


class RequestStats(BaseModel):
    """What a request has cost so far.

    forwards: forward passes that carried rows of this request (prefill, denoise, commit).
    blocks: generated blocks that are complete. denoise_steps: OPEN and DENOISE steps; dense_steps: those whose
    prefix was read densely for every row by the method's own rule. kv_density: share of prefix positions read per KV
    head, averaged over the later (non-first) steps and layers. kv_density_q: the same per query head, before the
    union over the KV group. active_share: share of block rows whose prefix attention was recomputed in later steps.
    active_overlap: the same among the tokens unmasked one step before. None where a request had no later step.
    kv_bytes: prefix K/V read in denoising steps; metadata_bytes: page summaries and keys read to choose them;
    dense_bytes: what dense attention would have read in these steps. bytes_ratio: what was read in the later steps
    relative to dense attention; block_bytes_ratio: the same over all denoising steps. None without a prefix.
    queued_s: seconds from arrival until it first ran; None while it has not.
    """

    model_config = ConfigDict(frozen=True)
    forwards: int = 0
    blocks: int = 0
    denoise_steps: int = 0
    dense_steps: int = 0
    kv_density: float | None = None
    kv_density_q: float | None = None
    active_share: float | None = None
    active_overlap: float | None = None
    kv_bytes: int = 0
    metadata_bytes: int = 0
    dense_bytes: int = 0
    bytes_ratio: float | None = None
    block_bytes_ratio: float | None = None
    retractions: int = 0
    queued_s: float | None = None


class RequestOutput(BaseModel):
    """News about one request; `text` and `token_ids` hold only what is new. Exactly one output has a `finish`.

    Text is final when it is sent: only accepted tokens, never part of a possible stop string, never half a character.
    prompt_logprobs: for a scoring request, one value per prompt position from `ScoreSpec.start`, on the last output;
    None (and no alternatives) for a first token that nothing speaks for.
    output_logprobs: one value per new token id, if asked for. prompt_alternatives, output_alternatives: one beside each
    of these values, if asked for. trace: denoising steps since the last output, for a request that asked for them.
    """

    model_config = ConfigDict(frozen=True)
    rid: str
    text: str = ""
    token_ids: tuple[int, ...] = ()
    output_logprobs: tuple[float, ...] | None = None
    prompt_logprobs: tuple[float | None, ...] | None = None
    output_alternatives: tuple[Alternatives, ...] | None = None
    prompt_alternatives: tuple[Alternatives | None, ...] | None = None
    trace: tuple[StepTrace, ...] = ()
    finish: FinishReason | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    stats: RequestStats = RequestStats()
