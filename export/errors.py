"""The one base of this package's errors."""

from __future__ import annotations


class ExportError(Exception):
    """An export that cannot go on; its message is one line that names the cause and the remedy."""


class ParityError(ExportError):
    """The exported graphs do not return what PyTorch returns; nothing was installed."""
