"""Coordinate rules: exact at every tile size, and the same positions in training as in serving."""

from __future__ import annotations

import dataclasses
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from client.outputs.hdf5 import Provenance, write_slide_h5
from client.scoring.result_key import SlideKeys
from client.scoring.score import ScoredSlide
from client.slides.slide import open_slide
from client.slides.tiling import plan_tiles
from gigapath_contract.coordinates import (
    CELL,
    CoordinateRule,
    LevelZeroScale,
    grid_coordinates,
    read_scale,
)
from gigapath_contract.errors import CoordinateError
from gigapath_contract.schema import Contract
from training.data.h5_features import read_bag

COLUMNS = np.arange(1000)
RULES: tuple[CoordinateRule, ...] = ("level0/256", "level0/patch_size_level0", "target-mpp/256")


def exact(rule: CoordinateRule, x: int, side: int) -> int:
    """The cell of level-0 pixel `x` in rational arithmetic, where a tile of 256 px is `side` wide."""
    mpp = Fraction(128, side)
    factor = {"level0/256": Fraction(1), "level0/patch_size_level0": Fraction(CELL, side)}.get(rule, mpp * 2)
    return int(x * factor // CELL)


@pytest.mark.parametrize("rule", RULES)
def test_every_tile_size_lands_where_exact_arithmetic_puts_it(rule: CoordinateRule) -> None:
    """Tile k, its first and its last pixel, lies in column k; `level0/256` counts pixels."""
    for side in range(100, 4097):
        scale = LevelZeroScale((side, side), (128 / side, 128 / side))
        for offset in (0, side - 1):
            x = COLUMNS * side + offset
            frame = grid_coordinates(np.stack([x, x], axis=1), rule, scale, grid=100_000)
            np.testing.assert_array_equal(frame[:, 0], frame[:, 1])
            cells = frame[:, 0] // CELL
            expected = x // CELL if rule == "level0/256" else COLUMNS
            np.testing.assert_array_equal(cells, expected, err_msg=f"tiles of {side} px")
            for column in (0, 1, 499, 999):
                assert cells[column] == exact(rule, int(x[column]), side)


@pytest.mark.parametrize("axis", [0, 1])
def test_the_axes_have_a_scale_each(axis: int) -> None:
    coords = np.zeros((len(COLUMNS), 2), np.int64)
    coords[:, axis] = COLUMNS * 506
    size, mpp = [300, 300], [128 / 300, 128 / 300]
    size[axis], mpp[axis] = 506, 128 / 506
    for rule in RULES[1:]:
        frame = grid_coordinates(coords, rule, LevelZeroScale((size[0], size[1]), (mpp[0], mpp[1])))
        np.testing.assert_array_equal(frame[:, axis] // CELL, COLUMNS)
        assert not frame[:, 1 - axis].any()


def with_rule(contract: Contract, rule: CoordinateRule) -> Contract:
    variant = dataclasses.replace(contract.variant, coordinates=rule)
    return dataclasses.replace(contract, variant=variant, head=None)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("mpp", [0.253, 0.2545, 0.4, 128 / 503])
def test_training_reads_the_positions_that_are_served(
    contract: Contract, rule: CoordinateRule, mpp: float, real_slide: Path, tmp_path: Path
) -> None:
    """The real slide, planned at a given mpp, stored by the client, read back by training."""
    with open_slide(real_slide, mpp) as slide:
        plan = plan_tiles(slide, None)
    served_as = with_rule(contract, rule)
    served = served_as.grid_coordinates(plan.coords, LevelZeroScale(plan.tile_size_level0, plan.mpp_level0))
    stored = tmp_path / "slide.h5"
    scored = ScoredSlide(
        plan=plan,
        contours=[],
        origin=(0, 0),
        thumbnail=np.zeros((1, 1, 3), np.uint8),
        embeddings=np.ones((len(plan), 4), np.float32),
        valid=np.ones(len(plan), np.bool_),
        layers=None,
        slide_embedding=None,
        logits=None,
    )
    write_slide_h5(stored, scored, Provenance(served_as, SlideKeys()))
    trained = read_bag(stored, rule).coords
    np.testing.assert_array_equal(trained, served)
    if rule != "level0/256":
        assert len(np.unique(trained // CELL, axis=0)) == len(plan)
    if mpp == 0.253:
        assert (plan.tile_size_level0, len(plan)) == ((506, 506), 30)


def test_a_scale_is_read_as_the_tools_write_it() -> None:
    assert read_scale({}) == LevelZeroScale()
    assert read_scale({"patch_size_level0": np.int64(512)}) == LevelZeroScale((512, 512))
    ours = {"tile_size_level0": np.array([506, 507]), "patch_size_level0": 506}
    assert read_scale(ours | {"mpp_level0_x": 0.25, "mpp_level0_y": 0.26}) == LevelZeroScale(
        (506, 507), (0.25, 0.26)
    )
    for size in (505.5, 0, "wide", [1, 2, 3]):
        with pytest.raises(CoordinateError, match="makes no sense"):
            read_scale({"patch_size_level0": size})


@pytest.mark.parametrize("rule", RULES[1:])
def test_a_rule_without_its_scale_is_refused(rule: CoordinateRule) -> None:
    with pytest.raises(CoordinateError, match=f"rule {rule} needs the slide's scale"):
        grid_coordinates(np.zeros((1, 2), np.int64), rule, LevelZeroScale())


def test_coordinates_of_any_number_type_give_int64() -> None:
    """Other tools store int32 and floats; 256 times an int32 would overflow from 8,388,608 px on."""
    coords = np.array([[9_000_000, 506]])
    for kind in (np.int32, np.uint64, np.float64):
        frame = grid_coordinates(
            coords.astype(kind), "level0/patch_size_level0", LevelZeroScale((20_000, 506))
        )
        assert frame.dtype == np.int64
        assert frame.tolist() == [[9_000_000 * 256 // 20_000, 256]]
