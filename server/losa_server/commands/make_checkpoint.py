"""`losa make-checkpoint`: a folder with random weights, to try the server or measure it without a download.

Parses options and prints a summary; what a checkpoint consists of is known in `losa_runtime.models`.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from losa_runtime.core.errors import LosaError
from losa_runtime.models.presets import FAMILY_FIELDS, PRESETS

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

_SHAPE: dict[str, tuple[str, str]] = {
    "layers": ("num_hidden_layers", "number of layers"),
    "hidden-size": ("hidden_size", "width of the residual stream"),
    "intermediate-size": ("intermediate_size", "width of the feed-forward layers"),
    "heads": ("num_attention_heads", "query heads"),
    "kv-heads": ("num_key_value_heads", "key/value heads, a divisor of the query heads"),
    "head-dim": ("head_dim", "size of one head, even"),
    "vocab-size": ("vocab_size", "rows of the embedding, at least 260"),
    "max-position": ("max_position_embeddings", "longest sequence in tokens"),
    "block-length": ("block_size", "positions per diffusion block"),
    "experts": ("num_experts", "experts per layer, for a family that has them"),
    "experts-per-token": ("num_experts_per_tok", "experts that a token goes to"),
    "expert-size": ("moe_intermediate_size", "width of one expert's hidden layer"),
}


def add_parser(subparsers: Subparsers) -> argparse.ArgumentParser:
    """Register the command and its options."""
    parser = subparsers.add_parser(
        "make-checkpoint",
        allow_abbrev=False,
        help="write a checkpoint with random weights",
        description="Write a loadable checkpoint folder with random weights and a byte-level tokenizer. "
        "It has the shape of a real model, so it shows real speed and memory; what it says is noise.",
    )
    parser.add_argument("folder", type=Path, help="where to write; created if needed")
    parser.add_argument("--force", action="store_true", help="replace a checkpoint that is already there")

    model = parser.add_argument_group("model")
    model.add_argument(
        "--preset", choices=tuple(PRESETS), default="tiny", help="shape to start from (default: %(default)s)"
    )
    model.add_argument(
        "--architecture", choices=tuple(FAMILY_FIELDS), help="model family, as in config.json (default: the preset's)"
    )
    model.add_argument("--seed", type=int, default=0, help="equal seeds give equal weights (default: %(default)s)")
    model.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="of the tensors (default: the preset's)"
    )
    model.add_argument(
        "--max-shard-mib", type=int, default=2048, help="size of one weight file in MiB (default: %(default)s)"
    )

    shape = parser.add_argument_group("shape", "Each of these replaces the preset's value.")
    for option, (field, text) in _SHAPE.items():
        shape.add_argument(f"--{option}", dest=field, type=int, default=None, metavar="N", help=text)
    shape.add_argument(
        "--tie-embeddings",
        dest="tie_word_embeddings",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="share embedding and output head",
    )
    parser.set_defaults(run=run)
    return parser


def run(args: argparse.Namespace) -> int:
    """Write the checkpoint; 0 on success, 2 with the reason on stderr."""
    fields = [field for field, _ in _SHAPE.values()] + ["tie_word_embeddings"]
    overrides: dict[str, Any] = {f: getattr(args, f) for f in fields if getattr(args, f) is not None}
    if args.max_shard_mib <= 0:
        print(f"losa make-checkpoint: --max-shard-mib: found {args.max_shard_mib}, allowed: above 0", file=sys.stderr)
        return 2

    from losa_runtime.models.random_checkpoint import write_random_checkpoint  # loads torch, which --help need not

    try:
        config = write_random_checkpoint(
            args.folder,
            args.preset,
            architecture=args.architecture,
            seed=args.seed,
            dtype=args.dtype,
            max_shard_bytes=args.max_shard_mib * 1024**2,
            overwrite=args.force,
            show_progress=sys.stderr.isatty(),
            **overrides,
        )
    except (LosaError, OSError) as error:
        print(f"losa make-checkpoint: {error}", file=sys.stderr)
        return 2
    size = sum(file.stat().st_size for file in args.folder.glob("*.safetensors"))
    print(f"wrote {args.folder} ({size / 1024**2:.1f} MiB of weights)")
    print(json.dumps(config.model_dump(exclude_none=True), indent=2))
    return 0
