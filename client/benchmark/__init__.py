"""Load generator and measurements for Triton servers."""
