"""The device that a benchmark runs on, chosen on its command line. Knows no benchmark."""

from __future__ import annotations

import argparse

import torch

GIB = 1 << 30


def add_device(parser: argparse.ArgumentParser) -> None:
    """The option."""
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")


def chosen_device(parser: argparse.ArgumentParser, name: str) -> torch.device:
    """The device of that name. Ends the program with a message if it is not there."""
    if name == "cuda" and not torch.cuda.is_available():
        parser.error("--device: found 'cuda', but torch sees no GPU; allowed here: cpu")
    return torch.device(name)
