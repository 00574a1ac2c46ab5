"""What can go wrong around a local Triton, as the user should read it."""

from __future__ import annotations


class ServerError(Exception):
    """One line that names the cause and the remedy."""
