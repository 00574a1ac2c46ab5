"""The export's parity report through a running server; needs neither PyTorch nor the ONNX files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from gigapath_contract.reference import Gates, ParityRow, Reference, compare, read_reference
from gigapath_contract.schema import Contract

from ..errors import ClientError, ContractMismatch
from .connection import Connection

TF32 = (
    "the server computes float32 products in TF32: the differences are those of a 10-bit mantissa. Turn it "
    "off: export again (its configurations set use_tf32 to 0, and its engines are built without TF32), or "
    "start the server with NVIDIA_TF32_OVERRIDE=0"
)
_TF32_RELATIVE = (2.0**-15, 2.0**-8)
"""Largest differences over an output's scale: a product's factors are rounded to 2^-11, and errors add up."""


def load_reference(path: Path, contract: Contract) -> tuple[Reference, Gates]:
    """The reference of the export served, and the gate of each model.

    Raises:
        ClientError: the file is missing or damaged.
        ContractMismatch: it is of another export than `contract`.
    """
    try:
        reference, made_for, gates = read_reference(path)
    except FileNotFoundError:
        raise ClientError(
            f"no reference at {path}: give the one of the export served, "
            f"slide_pipeline/{contract.version}/reference.npz, with --reference"
        ) from None
    except (OSError, ValueError) as error:
        raise ClientError(f"{path} is no reference file ({error}): take it from the export again") from error
    if made_for.export_id != contract.export_id:
        raise ContractMismatch(
            f"{path} belongs to export {made_for.export_id}, the server serves {contract.export_id} "
            f"(version {contract.version}): give its reference with --reference"
        )
    return reference, gates


def looks_like_tf32(rows: Sequence[ParityRow], contract: Contract) -> bool:
    """Whether float32 rows failed, all by about as much as TF32 changes them."""
    exact = {"slide_occlusion"} if contract.occlusion.precision == "fp32" else set()
    if contract.precision == "fp32":
        exact |= {"tile_encoder", "slide_encoder"}
    failed = [row for row in rows if row.model in exact and not row.passed]
    least, most = _TF32_RELATIVE
    return bool(failed) and all(
        least <= row.max_relative <= most and row.min_cosine > 0.999 for row in failed
    )


def verify(
    connection: Connection, reference: Reference, gates: Gates, contract: Contract
) -> Iterator[ParityRow]:
    """Send every reference request to the version served and compare, one row per output.

    Raises:
        ServerUnavailable: no server answered, also after the retries.
        RequestRefused: a server rejected a request.
    """
    for case in reference.cases():
        answers = connection.infer(
            case.model, case.inputs, list(case.outputs), version=contract.version, check_finite=False
        )
        yield from compare(case, answers, gates[case.model])
