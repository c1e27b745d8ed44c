"""The options that describe an engine, shared by the commands that start one. SGLang's names where it has them."""

from __future__ import annotations

import argparse
import json
from typing import Any, Literal, get_args, get_origin

from losa_runtime.core.config import EngineConfig

# Names of rope_scaling fields in Hugging Face configs -> ours.
_ROPE_NAMES = {"type": "kind", "rope_type": "kind"}


def add_engine_flags(parser: argparse.ArgumentParser) -> None:
    """Add the option groups. Each option's destination is a field of EngineConfig; absent ones keep its defaults."""
    model = parser.add_argument_group("model")
    _add(
        model,
        "--model-path",
        "--model",
        dest="model",
        required=True,
        metavar="PATH",
        help="checkpoint folder or hub id",
    )
    _add(model, "--tokenizer-path", "--tokenizer", dest="tokenizer", metavar="PATH", help="default: the model's")
    _add(model, "--dtype", help="of weights and activations")
    _add(model, "--device", help="where the model runs")
    _add(model, "--attention-backend", help="how attention is computed")
    _add(model, "--context-length", type=int, metavar="N", help="longest prompt plus output in tokens")
    _add(model, "--block-length", type=int, metavar="N", help="override the checkpoint's diffusion block length")
    _add(model, "--mask-token-id", type=int, metavar="ID", help="override the checkpoint's mask token")
    _add(model, "--rope-scaling", type=_json_object, metavar="JSON", help='e.g. \'{"kind": "yarn", "factor": 4.0}\'')
    _add(model, "--deterministic", action="store_true", help="bitwise equal results whatever else runs; slower")
    _add(model, "--random-seed", type=int, metavar="N", help="for requests that bring no seed of their own")

    memory = parser.add_argument_group("memory and batching")
    _add(memory, "--kv-cache-dtype", help="of the cached keys and values")
    _add(
        memory,
        "--mem-fraction-static",
        dest="mem_fraction",
        type=float,
        metavar="F",
        help="of free memory for the pool",
    )
    _add(memory, "--max-total-tokens", type=int, metavar="N", help="size of the page pool, instead of a fraction")
    _add(memory, "--page-size", type=int, metavar="N", help="tokens per page")
    _add(memory, "--max-running-requests", type=int, metavar="N", help="requests in one batch")
    _add(memory, "--max-queued-requests", type=int, metavar="N", help="requests that may wait; more get 503")
    _add(memory, "--chunked-prefill-size", type=int, metavar="N", help="prompt tokens per round")
    _add(memory, "--schedule-policy", help="who is admitted first: first come, longest cached prefix, or priority")
    _add(memory, "--radix-eviction-policy", help="which cached prefix goes first")
    _add(memory, "--disable-radix-cache", action="store_true", help="share no prefixes between requests")
    _add(memory, "--disable-fused-commit", action="store_true", help="store a finished block in a forward of its own")

    sparse = parser.add_argument_group("sparse attention (defaults; a request may choose otherwise in custom_params)")
    _add(sparse, "--sparse-method", metavar="NAME", help="what is read, e.g. dense, quest, losa")
    _add(
        sparse,
        "--sparse-methods",
        type=_names,
        metavar="NAMES",
        help="methods that requests may choose, by commas; pages keep only what these need (default: all)",
    )
    _add(sparse, "--token-budget", type=int, metavar="N", help="prefix tokens that each query may select")
    rule = sparse.add_mutually_exclusive_group()
    _add(rule, "--active-tokens", type=int, metavar="N", help="LoSA: rows recomputed per step, by count")
    _add(rule, "--active-ratio", type=float, metavar="F", help="LoSA: the same as a share of the block")
    _add(rule, "--active-tau", type=float, metavar="F", help="LoSA: the same as a share of the total change")
    _add(
        sparse,
        "--sparse-options",
        type=_json_object,
        metavar="JSON",
        help="further options of the method, e.g. '{\"dense_layers\": 2}'",
    )

    decoding = parser.add_argument_group("decoding (defaults; a request may choose otherwise in custom_params)")
    _add(decoding, "--algorithm", metavar="NAME", help="decoding algorithm")
    _add(decoding, "--threshold", type=float, metavar="F", help="confidence above which a token is accepted")
    _add(decoding, "--denoising-steps", type=int, metavar="N", help="planned steps per block")


def config_from(args: argparse.Namespace, **more: Any) -> EngineConfig:
    """The configuration that the parsed options describe. Raises ConfigError naming the option."""
    given = {name: value for name, value in vars(args).items() if name in EngineConfig.model_fields}
    rope = given.get("rope_scaling")
    if rope is not None:
        given["rope_scaling"] = {_ROPE_NAMES.get(name, name): value for name, value in rope.items()}
    return EngineConfig.parse(**given, **more)


def _add(group: argparse._ActionsContainer, *names: str, **options: Any) -> None:
    # SUPPRESS: an option that is not given is absent, so that EngineConfig alone knows the defaults.
    field = options.get("dest") or names[0].removeprefix("--").replace("-", "_")
    annotation, default = EngineConfig.model_fields[field].annotation, EngineConfig.model_fields[field].default
    if get_origin(annotation) is Literal:
        options["choices"] = get_args(annotation)
    if "help" in options and not options.get("required") and default not in (None, False):
        options["help"] += f" (default: {default})"
    group.add_argument(*names, default=argparse.SUPPRESS, **options)


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"not JSON: {error}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError("a JSON object is expected")
    return value
