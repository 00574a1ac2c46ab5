"""The base of this package's errors."""

from __future__ import annotations


class ExportError(Exception):
    """An export cannot continue; the message is one line that names the cause and the remedy."""
