"""Output files of a scored slide."""
