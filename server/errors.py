"""The base of this package's errors."""

from __future__ import annotations


class ServerError(Exception):
    """The local Triton cannot start or run; the message is one line that names the cause and the remedy."""
