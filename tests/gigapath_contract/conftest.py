"""The contract of a demo export, as it was written."""

from __future__ import annotations

from pathlib import Path

import pytest

from gigapath_contract.schema import Contract


@pytest.fixture(scope="session")
def contract_text() -> str:
    return Path(__file__).with_name("contract.json").read_text()


@pytest.fixture(scope="session")
def contract(contract_text: str) -> Contract:
    return Contract.parse(contract_text)
