"""Writes a training state as an ordinary Hugging Face checkpoint folder.

python -m benchmarks.tiny_model.export --name main
python -m benchmarks.tiny_model.export --random        # untrained weights, for tests of loading
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from benchmarks.tiny_model import tokenizer as tokens
from benchmarks.tiny_model.batches import FILL, IM_END, MASK
from benchmarks.tiny_model.network import BLOCK, Network, Shape

HERE = Path(__file__).parent


def config(shape: Shape) -> dict:
    """The config.json of the model."""
    return {
        "architectures": ["SDARForCausalLM"],
        "model_type": "sdar",
        **shape.dict(),
        "max_position_embeddings": 32768,
        "block_size": BLOCK,
        "mask_token_id": MASK,
        "eos_token_id": IM_END,
        "pad_token_id": FILL,
        "bos_token_id": None,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "rope_scaling": None,
        "use_sliding_window": False,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "initializer_range": 0.02,
        "use_cache": False,
        "torch_dtype": "bfloat16",
    }


def export(net: Network, folder: Path) -> None:
    """Write config, generation settings and bf16 weights; the tokenizer is written when it is missing."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config(net.shape), indent=2) + "\n")
    generation = {"eos_token_id": [IM_END, FILL], "pad_token_id": FILL, "temperature": 0.0, "do_sample": False}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    weights = {name: p.detach().to(torch.bfloat16).contiguous() for name, p in net.state_dict().items()}
    save_file(weights, str(folder / "model.safetensors"), metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)
    if not (folder / "tokenizer.json").exists():
        tokens.save(tokens.train(), folder)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--name", default="main")
    parser.add_argument("--random", action="store_true")
    parser.add_argument("--out", type=Path, default=HERE / "checkpoint")
    args = parser.parse_args()
    if args.random:
        net = Network(Shape())
    else:
        state = torch.load(HERE / "runs" / args.name / "state.pt", weights_only=True)
        net = Network(Shape(**state["shape"]))
        net.load_state_dict(state["net"])
    export(net, args.out)
    size = (args.out / "model.safetensors").stat().st_size / 1e6
    print(f"wrote {args.out}: {sum(p.numel() for p in net.parameters()):,} parameters, {size:.1f} MB")


if __name__ == "__main__":
    main()
