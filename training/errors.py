"""The one base of every error that `training` raises on purpose."""

from __future__ import annotations


class TrainingError(Exception):
    """A user's mistake or a missing thing: one line that names the cause and the remedy."""
