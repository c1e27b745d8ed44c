"""What people meant: near misses, and names that other servers use for the same thing."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

# Options of vLLM and SGLang that people type from memory -> what is here instead.
FOREIGN = {
    "max-model-len": "here: --context-length",
    "max-num-seqs": "here: --max-running-requests",
    "max-num-batched-tokens": "here: --chunked-prefill-size",
    "max-prefill-tokens": "here: --chunked-prefill-size",
    "gpu-memory-utilization": "here: --mem-fraction-static",
    "num-gpu-blocks-override": "here: --max-total-tokens",
    "block-size": "here: --page-size for K/V pages, --block-length for diffusion blocks",
    "dllm-block-size": "here: --block-length",
    "dllm-algorithm-config": "here: --threshold and --denoising-steps",
    "enable-prefix-caching": "it is always on; --disable-radix-cache turns it off",
    "no-enable-prefix-caching": "here: --disable-radix-cache",
    "scheduling-policy": "here: --schedule-policy",
    "seed": "here: --random-seed",
    "uvicorn-log-level": "here: --log-level",
    "hf-overrides": "here: --rope-scaling, --block-length, --mask-token-id",
    "enable-deterministic-inference": "here: --deterministic",
    "disable-overlap-schedule": "here: --overlap-schedule off",
    "enforce-eager": "not an option here",
    "disable-cuda-graph": "not an option here",
    "cuda-graph-max-bs": "not an option here",
    "enable-torch-compile": "not an option here",
    "grammar-backend": "not needed: constraints are built in",
    "guided-decoding-backend": "not needed: constraints are built in",
    "chat-template": "not available: the checkpoint's own template is used",
    "trust-remote-code": "not needed: code from a checkpoint is never run",
    "tensor-parallel-size": "not available: a model runs on one device",
    "tp-size": "not available: a model runs on one device",
    "tp": "not available: a model runs on one device",
    "pipeline-parallel-size": "not available: a model runs on one device",
    "data-parallel-size": "not available: start one server per device",
    "dp-size": "not available: start one server per device",
    "torchao-config": "here: --quantization int8 or fp8",
    "enable-lora": "not available",
    "lora-paths": "not available",
}


def hint(word: str, known: Iterable[str]) -> str:
    """What to say behind an unknown name, in parentheses with a leading space; empty if nothing comes to mind.

    Flags, variables and keys of files are compared without what makes them look different.
    """
    name = _plain(word)
    if name in FOREIGN:
        return f" ({FOREIGN[name]})"
    spelled = {_plain(other): other for other in known}
    near = difflib.get_close_matches(name, spelled, n=1, cutoff=0.7)
    return f" (did you mean {spelled[near[0]]}?)" if near else ""


def _plain(name: str) -> str:
    return name.removeprefix("LOSA_").lstrip("-").replace("_", "-").lower()
