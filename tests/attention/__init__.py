"""Tests of the attention backends over a paged pool."""
