"""The contract that a server's models carry: read it, and notice when it changes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from gigapath_contract.errors import ContractError
from gigapath_contract.schema import MODELS, Contract

from ..errors import ClientError, ContractMismatch, ExportChanged, RequestRefused
from .connection import Connection


def read_contract(
    connection: Connection, missing: Callable[[str, ClientError], None] | None = None
) -> Contract:
    """The contract that all servers and all their models carry.

    Args:
        connection: to the servers.
        missing: called at once with a server that can't be reached, and why; the contract is then that of the
            others. None: all must answer.

    Raises:
        ContractMismatch: a model has none, an unreadable one, or two of them differ.
        ServerUnavailable, DeadlineExceeded, RequestRefused: as `Connection.infer`; of every server, or where
            `missing` is given of all together.
    """
    found: dict[str, tuple[Contract, str]] = {}
    named = set[str]()

    def name_once(server: str, error: ClientError) -> None:
        if missing and server not in named:
            named.add(server)
            missing(server, error)

    for model in MODELS:
        if missing is None:
            configs = connection.model_configs(model)
        else:
            configs = connection.reachable_configs(model, missing=name_once)
        for server, config in configs.items():
            contract = _contract_in(config, f"{model} at {server}")
            found.setdefault(contract.export_id, (contract, f"{model} at {server}"))
    if len(found) > 1:
        (one, here), (two, there) = list(found.values())[:2]
        raise ContractMismatch(
            f"{here} serves export {one.export_id}, {there} {two.export_id}: serve one export everywhere"
        )
    return next(iter(found.values()))[0]


def check_same(connection: Connection, contract: Contract) -> None:
    """Check that every server that can be reached still serves the export that `contract` was read from.

    Raises:
        ExportChanged: a server now serves another export.
        ContractMismatch: a model has no contract, or an unreadable one.
        ServerUnavailable, DeadlineExceeded, RequestRefused: as `Connection.infer`.
    """
    try:
        configs = connection.reachable_configs("tile_encoder", contract.version)
    except RequestRefused:  # another export in its place has another version
        configs = connection.reachable_configs("tile_encoder")
    for server, config in configs.items():
        now = _contract_in(config, f"tile_encoder at {server}")
        if now.export_id != contract.export_id:
            raise ExportChanged(
                f"the server changed from export {contract.export_id} to {now.export_id} meanwhile: run again"
            )


class ExportGuard:
    """Notices during a long piece of work that a server came back with another export."""

    def __init__(self, connection: Connection, contract: Contract) -> None:
        self._connection = connection
        self._contract = contract
        self._seen = connection.interruptions

    def check(self) -> None:
        """Check the servers again if one was away since the last check; raises as `check_same` does."""
        interruptions = self._connection.interruptions
        if interruptions != self._seen:
            check_same(self._connection, self._contract)
            self._seen = interruptions


_parsed = functools.lru_cache(maxsize=8)(Contract.parse)  # it is checked twice per slide, and rarely another


def _contract_in(config: Any, where: str) -> Contract:
    if "contract" not in config.parameters:
        raise ContractMismatch(
            f"{where} carries no contract, so nobody knows what it computes: "
            "export it with `python -m export run` and start the server again"
        )
    try:
        return _parsed(config.parameters["contract"].string_value)
    except ContractError as error:
        raise ContractMismatch(
            f"{where}: {error}; export the model again with this release and restart the server"
        ) from error
