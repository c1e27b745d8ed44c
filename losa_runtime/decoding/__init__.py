"""What is unmasked: pure functions from logits to accepted tokens. Knows no request queue and no cache."""
