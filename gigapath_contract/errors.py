"""The errors of this package, and any error's message in one line."""

from __future__ import annotations


class ContractError(ValueError):
    """A contract that cannot be read, or data that does not fit it; the message is one line."""


class CoordinateError(ContractError):
    """An unknown rule, a scale that the rule needs and lacks, or a tile outside the position grid."""


class MppMissing(CoordinateError):
    """Coordinates in µm without the slide's mpp, which whoever reads them may be able to give."""


class FeatureFileError(ContractError):
    """A file that holds no usable tile embeddings; the message is the reason alone."""


class TableError(ContractError):
    """A file that is not a table in UTF-8; the message is the reason alone."""


def one_line(error: Exception | str) -> str:
    """An error's message without line breaks; where it has none, its kind."""
    return " ".join(str(error).split()) or type(error).__name__
