"""Tests that need a GPU: `make test-gpu`. They can be collected anywhere, and fail where there is none."""
