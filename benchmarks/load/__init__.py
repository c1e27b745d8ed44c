"""The load test of `losa bench`, run over a table of workloads and along the axes of growing work, with plots."""
