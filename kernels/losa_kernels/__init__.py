"""Tensor in, tensor out: the reference (the specification) and, beside it, fast versions. Knows no request."""
