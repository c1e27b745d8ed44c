"""Tests of the sparse methods, their parameters and the meeting with the backend."""
