"""Random regular expressions of the syntax that Rust and Python share, and always with something that matches."""

from __future__ import annotations

import random

LETTERS = 'abcxyz019 .,:-_é"{}'
CLASSES = ("[a-c]", "[^a]", "[0-9]", r"\d", r"[a-z0-9]", ".", '[^\\n"]', "[éü]")


def random_pattern(rng: random.Random, depth: int = 3) -> str:
    """A pattern of moderate size; its automaton stays small."""
    kind = rng.random()
    if depth == 0 or kind < 0.25:
        text = "".join(rng.choice(LETTERS) for _ in range(rng.randint(1, 4)))
        return "".join(f"\\{c}" if c in ".{}-" else c for c in text)
    if kind < 0.45:
        return rng.choice(CLASSES)
    inner = random_pattern(rng, depth - 1)
    if kind < 0.65:
        low = rng.randint(0, 2)
        times = rng.choice(["*", "+", "?", f"{{{low},{low + rng.randint(0, 3)}}}", f"{{{low},}}"])
        return f"(?:{inner}){times}"
    if kind < 0.8:
        return f"(?:{inner}|{random_pattern(rng, depth - 1)})"
    return inner + random_pattern(rng, depth - 1)
