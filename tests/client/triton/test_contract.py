"""The contract: strict to read, exact in its arithmetic."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from client.slides.slide import open_slide
from client.slides.tiling import plan_tiles
from client.triton.connection import Connection
from client.triton.contract import Contract, ContractError, HeadContract, check_same


def changed(contract: Contract, **parts: object) -> str:
    return json.dumps({**json.loads(contract.text), **parts})


def with_rule(contract: Contract, rule: str) -> Contract:
    return dataclasses.replace(contract, variant=dataclasses.replace(contract.variant, coordinates=rule))


def test_a_contract_survives_reading(contract: Contract) -> None:
    again = Contract.parse(contract.text)
    assert again == contract
    assert (contract.tile.size_px, contract.tile.crop_px, contract.tile.mpp) == (256, 224, 0.5)
    assert contract.tile.max_batch == 64


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("[]", "schema None"),
        ('{"schema": 2}', "schema 2, this client reads 1"),
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
        ({"trained": None}, r"contract\.trained"),
    ],
)
def test_a_field_of_another_type_is_named(contract: Contract, parts: dict[str, object], message: str) -> None:
    with pytest.raises(ContractError, match=message):
        Contract.parse(changed(contract, **parts))


def test_another_export_meanwhile_is_noticed(connection: Connection, contract: Contract) -> None:
    check_same(connection, contract)
    with pytest.raises(ContractError, match=r"changed from export other to .* run again"):
        check_same(connection, dataclasses.replace(contract, export_id="other"))


def test_coordinate_rules_by_hand(contract: Contract) -> None:
    coords = np.array([[0, 0], [1030, 515], [2575, 1545]])  # tiles of 515 px: 0.2485 mpp
    frames = {
        "level0/256": coords,
        "level0/patch_size_level0": [[0, 0], [512, 256], [1280, 768]],
        "target-mpp/256": [[0, 0], [511, 255], [1279, 767]],
    }
    for rule, expected in frames.items():
        frame = with_rule(contract, rule).grid_coordinates(
            coords, tile_size_level0=(515, 515), mpp_level0=(0.2485, 0.2485)
        )
        assert frame.dtype == np.int64
        np.testing.assert_array_equal(frame, expected)


def test_a_tile_outside_the_position_grid_is_named(contract: Contract) -> None:
    edge = np.array([[0, 0], [999 * 256, 999 * 256 + 255]])

    def frame(rule: str, coords: np.ndarray) -> np.ndarray:
        sized = with_rule(contract, rule)
        return sized.grid_coordinates(coords, tile_size_level0=(256, 256), mpp_level0=(0.5, 0.5))

    np.testing.assert_array_equal(frame("level0/256", edge), edge)
    for outside in ([1000 * 256, 0], [0, 1000 * 256], [-1, 0]):
        with pytest.raises(ContractError, match=rf"tile 1 at level-0 \({outside[0]}, {outside[1]}\)"):
            frame("level0/256", np.array([[0, 0], outside]))
    with pytest.raises(ContractError, match="rule 'none' is unknown"):
        frame("none", edge)


@pytest.mark.parametrize("options", [{"mpp": 1.0}, {"tile_px": 512}, {"crop_px": 256}])
def test_a_plan_of_other_tiles_is_refused(
    contract: Contract, real_slide: Path, options: dict[str, float]
) -> None:
    with open_slide(real_slide) as slide:
        contract.check_plan(plan_tiles(slide, None))
        with pytest.raises(ContractError, match="instead of"):
            contract.check_plan(plan_tiles(slide, None, **options))  # type: ignore[arg-type]
        few = dataclasses.replace(contract, limits=dataclasses.replace(contract.limits, max_tiles=10))
        with pytest.raises(ContractError, match="108 tiles are more than the 10"):
            few.check_plan(plan_tiles(slide, None))


def test_probabilities() -> None:
    logits = np.array([1000.0, 999.0, -1000.0], np.float32)
    multiclass = HeadContract("", ("a", "b", "c"), "multiclass").probabilities(logits)
    np.testing.assert_allclose(multiclass, [0.7310586, 0.2689414, 0.0], atol=1e-7)
    assert multiclass.dtype == np.float32
    multilabel = HeadContract("", ("a", "b"), "multilabel").probabilities(np.array([0.0, 2.0], np.float32))
    np.testing.assert_allclose(multilabel, [0.5, 0.8807970], atol=1e-7)
