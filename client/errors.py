"""What can go wrong on a user's side; every message is one line that names the cause and the remedy."""

from __future__ import annotations


class ClientError(Exception):
    """Base of every error that a user of the client can cause or meet."""


class SlideError(ClientError):
    """A slide that cannot be opened or read."""


class MppError(SlideError):
    """A slide whose physical scale is unknown, or a scale that makes no sense."""


class PlanError(ClientError):
    """A slide that cannot be tiled as asked."""


class MaskError(ClientError):
    """A mask image or an annotation file that cannot be used."""
