"""The contract that a running server carries."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from client.errors import ContractMismatch
from client.triton.connection import Connection
from client.triton.contract import check_same
from gigapath_contract.schema import Contract


def test_the_export_s_contract_arrives(contract: Contract, demo_repository: Path) -> None:
    written = (demo_repository / "slide_pipeline" / "1" / "contract.json").read_text()
    assert contract.to_json() == written.strip()


def test_another_export_meanwhile_is_noticed(connection: Connection, contract: Contract) -> None:
    check_same(connection, contract)
    with pytest.raises(ContractMismatch, match=r"changed from export other to .* run again"):
        check_same(connection, dataclasses.replace(contract, export_id="other"))
