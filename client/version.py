"""The release: the distribution's, and the one written into every output."""

from __future__ import annotations

__version__ = "0.1.0"
