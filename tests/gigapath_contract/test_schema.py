"""The contract: strict to read, the same bytes when written again."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest

from gigapath_contract.coordinates import LevelZeroScale
from gigapath_contract.errors import ContractError
from gigapath_contract.schema import Contract


def changed(contract: Contract, **parts: object) -> str:
    return json.dumps({**json.loads(contract.to_json()), **parts})


def with_rule(contract: Contract, rule: str) -> Contract:
    return dataclasses.replace(contract, variant=dataclasses.replace(contract.variant, coordinates=rule))


def test_a_contract_survives_reading(contract: Contract, contract_text: str) -> None:
    assert contract.to_json() == contract_text.strip()
    again = Contract.parse(contract.to_json())
    assert again == contract
    assert (contract.tile.size_px, contract.tile.crop_px, contract.tile.mpp) == (256, 224, 0.5)
    assert contract.tile.max_batch == 64


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ('{"a":' * 100_000, "not JSON .*nested too deeply"),
        ("1" * 5000, "not JSON"),
        ("[]", "schema None"),
        ('{"schema": 2}', "schema 2, this release reads 1"),
        ('{"schema": 1}', "field"),
    ],
)
def test_what_is_no_contract_is_refused(text: str, message: str) -> None:
    with pytest.raises(ContractError, match=message):
        Contract.parse(text)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"version": "1"}, r"contract\.version should be .* a int"),
        ({"version": True}, r"contract\.version"),
        ({"tile": {"size_px": 256}}, r"contract\.tile should .* crop_px, max_batch, mpp"),
        ({"head": {"weights_sha256": "x", "classes": "ab", "kind": "binary"}}, r"head\.classes .* a list"),
        ({"head": {"weights_sha256": "x", "classes": ["a"], "kind": "two"}}, r"head\.kind .* multilabel"),
        ({"trained": None}, r"contract\.trained"),
        ({"version": -1}, r"contract\.version should be or have a count"),
        ({"version": 10**400}, r"contract\.version should be or have a count"),
        *(
            ({"tile": {"size_px": 256, "crop_px": 224, "mpp": mpp, "max_batch": 1}}, r"tile\.mpp .* positive")
            for mpp in (0, -1, float("nan"), float("inf"), 10**400)
        ),
        (
            {"tile": {"size_px": 256, "crop_px": 257, "mpp": 0.5, "max_batch": 1}},
            r"contract\.tile .* crop_px",
        ),
        ({"tile": {"size_px": 256, "crop_px": 224, "mpp": 0.5, "max_batch": 0}}, "positive sizes and limits"),
        ({"limits": {"max_tiles": 0, "grid": 1000}}, "positive sizes and limits"),
    ],
)
def test_a_field_of_another_type_is_named(contract: Contract, parts: dict[str, object], message: str) -> None:
    with pytest.raises(ContractError, match=message):
        Contract.parse(changed(contract, **parts))


def test_coordinate_rules_by_hand(contract: Contract) -> None:
    coords = np.array([[0, 0], [1030, 515], [2575, 1545]])  # tiles of 515 px: 0.2485 mpp
    frames = {
        "level0/256": coords,
        "level0/patch_size_level0": [[0, 0], [512, 256], [1280, 768]],
        "target-mpp/256": [[0, 0], [511, 255], [1279, 767]],
    }
    for rule, expected in frames.items():
        frame = with_rule(contract, rule).grid_coordinates(
            coords, LevelZeroScale((515, 515), (0.2485, 0.2485))
        )
        assert frame.dtype == np.int64
        np.testing.assert_array_equal(frame, expected)


def test_a_tile_outside_the_position_grid_is_named(contract: Contract) -> None:
    edge = np.array([[0, 0], [999 * 256, 999 * 256 + 255]])

    def frame(rule: str, coords: np.ndarray) -> np.ndarray:
        sized = with_rule(contract, rule)
        return sized.grid_coordinates(coords, LevelZeroScale((256, 256), (0.5, 0.5)))

    np.testing.assert_array_equal(frame("level0/256", edge), edge)
    for outside in ([1000 * 256, 0], [0, 1000 * 256], [-1, 0]):
        with pytest.raises(ContractError, match=rf"tile 1 at level-0 \({outside[0]}, {outside[1]}\)"):
            frame("level0/256", np.array([[0, 0], outside]))
    with pytest.raises(ContractError, match="rule 'none' is unknown"):
        frame("none", edge)


def test_the_documentation_names_every_field(contract: Contract) -> None:
    page = (Path(__file__).parents[2] / "docs" / "export.md").read_text()
    section = page.partition("## The contract")[2].partition("\n## ")[0]
    named = set(re.findall(r"`(\w+)`", section))
    data = dataclasses.asdict(contract)
    nested = {
        name
        for field, value in data.items()
        if field != "versions" and isinstance(value, dict)
        for name in value
    }
    assert data.keys() | nested <= named
