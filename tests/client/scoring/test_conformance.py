"""Plans and positions held to a contract, without a server."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from client.errors import ContractMismatch
from client.scoring.conformance import check_plan, grid_coordinates
from client.slides.slide import open_slide
from client.slides.tiling import plan_tiles
from gigapath_contract.coordinates import LevelZeroScale
from gigapath_contract.schema import Contract


@pytest.fixture(scope="module")
def contract() -> Contract:
    path = Path(__file__).parents[2] / "gigapath_contract" / "contract.json"
    return Contract.parse(path.read_text())


@pytest.mark.parametrize("options", [{"mpp": 1.0}, {"tile_px": 512}, {"crop_px": 256}])
def test_a_plan_of_other_tiles_is_refused(
    contract: Contract, real_slide: Path, options: dict[str, float]
) -> None:
    with open_slide(real_slide) as slide:
        check_plan(plan_tiles(slide, None), contract)
        with pytest.raises(ContractMismatch, match="instead of"):
            check_plan(plan_tiles(slide, None, **options), contract)  # type: ignore[arg-type]
        few = dataclasses.replace(contract, limits=dataclasses.replace(contract.limits, max_tiles=10))
        with pytest.raises(ContractMismatch, match="108 tiles are more than the 10"):
            check_plan(plan_tiles(slide, None), few)


def test_a_tile_off_the_grid_is_an_error_of_the_client(contract: Contract) -> None:
    outside = np.array([[1000 * 256, 0]])
    with pytest.raises(ContractMismatch, match="tile 0 at level-0"):
        grid_coordinates(contract, outside, LevelZeroScale())
