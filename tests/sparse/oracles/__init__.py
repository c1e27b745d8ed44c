"""The methods once more, from the papers' text, one module each: float64, plain loops, no code shared with them."""
