"""Benchmarks: `make bench NAME=...` runs one, and it writes the page of that name in docs/benchmarks/."""
