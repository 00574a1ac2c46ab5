"""Drivers that measure; each writes the page of its name in docs/benchmarks/."""
