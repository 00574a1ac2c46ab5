"""Every error of the client; each message is one line that names the cause and a remedy.

    ClientError
    ├── SlideError               a slide cannot be opened or read
    │   └── MppError             its microns per pixel are unknown or implausible
    ├── SlideServerError         a slide's server cannot be reached, or does not give it
    ├── PlanError                a slide cannot be tiled with these options
    ├── MaskError                a mask image or an annotation file cannot be used
    ├── ManifestError            a manifest or a folder cannot be read as a list of slides
    ├── ContractMismatch         the model's contract is missing or unreadable, or a slide does not fit it
    │   └── ExportChanged        a server now serves another export than before
    ├── ServerUnavailable        no server could be reached
    ├── DeadlineExceeded         a server that can be reached did not answer a request in time
    ├── RequestRefused           a server rejected the request
    ├── NonFiniteAnswer          a server's answer holds NaN or infinite values
    ├── Cancelled                the connection was cancelled
    └── OutputError              an output cannot be written
        └── DiskFull             the disk is full

`client.cli.main` prints a ClientError as one line and exits with code 1.
"""

from __future__ import annotations

from collections.abc import Sequence


class ClientError(Exception):
    """Base of every error that a user of the client can cause or meet."""


class SlideError(ClientError):
    """A slide that cannot be opened or read."""


class MppError(SlideError):
    """A slide whose microns per pixel are unknown, or a value that is not plausible."""


class SlideServerError(ClientError):
    """A slide that its server does not give, or changed: all of it fails, where damage is one tile's."""


class PlanError(ClientError):
    """A slide that cannot be tiled with the options given."""


class MaskError(ClientError):
    """A mask image or an annotation file that cannot be used."""


class ManifestError(ClientError):
    """The manifest or folder cannot be read as a list of slides."""


class ContractMismatch(ClientError):
    """The served model's contract is missing or unreadable, or a slide's plan or embeddings do not fit it."""


class ExportChanged(ContractMismatch):
    """A server serves another export than the one whose contract was read."""


class ServerUnavailable(ClientError):
    """No server could be reached, also after the retries."""


class DeadlineExceeded(ClientError):
    """A request missed its deadline, also after the retries, on a server that can be reached."""


class RequestRefused(ClientError):
    """A server rejected the request; sending it again cannot help."""


class NonFiniteAnswer(ClientError):
    """A server's answer holds NaN or infinite values; `rows` are those of `output` that do."""

    def __init__(self, model: str, output: str, rows: Sequence[int], total: int, where: str = "") -> None:
        self.model, self.output, self.rows, self.total = model, output, tuple(rows), total
        super().__init__(
            f"{where}{': ' if where else ''}{model} returned NaN or infinite values in {len(self.rows)} of "
            f"{total} rows of {output}; nothing of it is kept: compare the server with its export "
            "(gigapath-client verify), and export in fp32 where half precision overflows"
        )

    def at(self, where: str) -> NonFiniteAnswer:
        """The same error, with the slide or tile that it concerns."""
        return NonFiniteAnswer(self.model, self.output, self.rows, self.total, where)


class Cancelled(ClientError):
    """The connection was cancelled (Ctrl-C) while a request was in flight."""


class OutputError(ClientError):
    """An output cannot be written."""


class DiskFull(OutputError):
    """An output cannot be written because the disk, or the user's share of it, is full."""
