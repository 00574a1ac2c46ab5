"""Attributions as pictures and files."""
