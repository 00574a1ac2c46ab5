"""Load on Triton servers, and what they make of it."""
