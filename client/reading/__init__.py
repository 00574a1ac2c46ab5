"""Tile pixels, decoded in parallel and in order."""
