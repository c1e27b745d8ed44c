"""Tests of losa_runtime/runner."""
