"""Slide files, their scale, tissue and tiles."""
