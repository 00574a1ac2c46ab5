"""The quick start: one real slide, end to end."""
