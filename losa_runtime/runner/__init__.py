"""Runs one round: introduces model, sparse method, backend and decoding to each other."""
