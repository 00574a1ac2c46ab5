"""Every error of the client; each message is one line that names the cause and a remedy.

    ClientError
    ├── SlideError               a slide cannot be opened or read
    │   └── MppError             its microns per pixel are unknown or implausible
    ├── PlanError                a slide cannot be tiled with these options
    ├── MaskError                a mask image or an annotation file cannot be used
    ├── ManifestError            a manifest or a folder cannot be read as a list of slides
    ├── ContractMismatch         the model's contract is missing or unreadable, or a slide does not fit it
    ├── ServerUnavailable        no server could be reached
    ├── DeadlineExceeded         a server that can be reached did not answer a request in time
    ├── RequestRefused           a server rejected the request
    ├── Cancelled                the connection was cancelled
    └── OutputError              an output cannot be written

`client.cli.main` prints a ClientError as one line and exits with code 1.
"""

from __future__ import annotations


class ClientError(Exception):
    """Base of every error that a user of the client can cause or meet."""


class SlideError(ClientError):
    """A slide that cannot be opened or read."""


class MppError(SlideError):
    """A slide whose microns per pixel are unknown, or a value that is not plausible."""


class PlanError(ClientError):
    """A slide that cannot be tiled with the options given."""


class MaskError(ClientError):
    """A mask image or an annotation file that cannot be used."""


class ManifestError(ClientError):
    """The manifest or folder cannot be read as a list of slides."""


class ContractMismatch(ClientError):
    """The served model's contract is missing or unreadable, or a slide's plan or embeddings do not fit it."""


class ServerUnavailable(ClientError):
    """No server could be reached, also after the retries."""


class DeadlineExceeded(ClientError):
    """A request missed its deadline, also after the retries, on a server that can be reached."""


class RequestRefused(ClientError):
    """A server rejected the request; sending it again cannot help."""


class Cancelled(ClientError):
    """The connection was cancelled (Ctrl-C) while a request was in flight."""


class OutputError(ClientError):
    """An output cannot be written."""
