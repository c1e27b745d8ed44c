"""Tests of the reference: the specification is itself checked against loops and float64."""
