"""The one base of this package's errors."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from export.parity import Report


class ExportError(Exception):
    """An export that cannot go on; its message is one line that names the cause and the remedy."""


class ParityError(ExportError):
    """The exported graphs do not return what PyTorch returns (`report` says where); nothing was installed."""

    def __init__(self, message: str, report: Report) -> None:
        super().__init__(message)
        self.report = report
