"""The plan: tiles lie on the grid, have the physical size they claim, and follow the tissue."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from client.errors import PlanError, SlideError
from client.reading.stream import read_tiles
from client.slides.slide import open_slide
from client.slides.tiling import TilePlan, plan_tiles
from client.slides.tissue import TissueMask
from tests.support.pyramid import write_pyramid

TARGET = 0.5
LEFT, RIGHT, TOP, BOTTOM = 30.0, 90.0, 40.0, 80.0  # microns from a tile's corner: the ruler's rectangle
PITCH = 128.0  # microns: a tile


def ruler(mpp: tuple[float, float]) -> NDArray[np.uint8]:
    """A dark rectangle of known microns in each of three tiles in a row, drawn to a fraction of a pixel."""

    def covered(tiles: int, scale: float, low: float, high: float) -> NDArray[np.float64]:
        count = 16 * round(tiles * PITCH / scale / 16)  # so that levels are exact fractions
        start = np.arange(count) * scale % PITCH  # of each pixel
        part = np.clip((np.minimum(start + scale, high) - np.maximum(start, low)) / scale, 0, 1)
        return np.asarray(part, np.float64)

    dark = np.outer(covered(1, mpp[1], TOP, BOTTOM), covered(3, mpp[0], LEFT, RIGHT))
    return np.repeat(np.rint(240 - 200 * dark).astype(np.uint8)[..., None], 3, axis=2)


def crossings(profile: NDArray[np.float64]) -> tuple[float, float]:
    """Where a profile falls below and rises above half its height, in pixels from the first one's corner."""
    level = (profile.max() + profile.min()) / 2
    below = np.flatnonzero(profile < level)
    first, last = int(below[0]), int(below[-1])
    enter = first - 1 + (profile[first - 1] - level) / (profile[first - 1] - profile[first])
    leave = last + (level - profile[last]) / (profile[last + 1] - profile[last])
    return enter + 0.5, leave + 0.5


def plan(path: Path, own_mpp: float | None = None, **options: object) -> TilePlan:
    with open_slide(path, own_mpp) as slide:
        return plan_tiles(slide, None, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("mpp", "levels", "level", "resampled"),
    [
        (0.25, (1,), 0, True),
        (0.25, (1, 2, 4), 1, False),
        (0.25, (1, 4), 0, True),
        (0.2520, (1,), 0, True),  # exactly two pixels become one: 0.504
        (0.2527, (1, 2), 0, True),  # its second level is 1.1 % off
        (0.499, (1, 2), 0, False),
        (0.5, (1,), 0, False),
        (0.504, (1,), 0, False),
        (0.11, (1, 2, 4), 2, True),
        (0.55, (1,), 0, True),  # magnified 1.1 times, as much as is allowed
        ((0.25, 0.26), (1,), 0, True),
        ((0.25, 0.26), (1, 2), 0, True),
        ((0.46, 0.52), (1,), 0, True),
    ],
)
def test_physical_size(
    tmp_path: Path, mpp: float | tuple[float, float], levels: tuple[int, ...], level: int, resampled: bool
) -> None:
    own = mpp if isinstance(mpp, tuple) else (mpp, mpp)
    path = write_pyramid(tmp_path / "r.tif", ruler(own), mpp=own, levels=levels, quality=95)
    tiles = plan(path)
    assert (tiles.level, tiles.resampled) == (level, resampled)
    assert tiles.mpp_effective == pytest.approx((TARGET, TARGET), rel=0.01)
    pixels = next(read_tiles(tiles)).pixels
    for index in (0, 1, 2):
        grey = pixels[index].mean(axis=2)
        x0, x1 = crossings(grey[90:110].mean(axis=0))
        y0, y1 = crossings(grey[:, 70:130].mean(axis=1))
        assert (x1 - x0) * TARGET == pytest.approx(RIGHT - LEFT, rel=0.01)
        assert (y1 - y0) * TARGET == pytest.approx(BOTTOM - TOP, rel=0.01)
        # And it lies where it should: the crop starts 16 px into the tile, the tile where the plan says.
        corner = tiles.coords[index] * own
        margin = (tiles.tile_px - tiles.crop_px) / 2
        x = (x0 + margin) * tiles.mpp_effective[0] + corner[0] - PITCH * index
        y = (y0 + margin) * tiles.mpp_effective[1] + corner[1]
        assert (x, y) == pytest.approx((LEFT, TOP), abs=0.6)


@pytest.mark.parametrize("mpp", [1.0, 0.556, (0.5, 0.6)])
def test_coarse_slides_are_refused(tmp_path: Path, mpp: float | tuple[float, float]) -> None:
    path = write_pyramid(tmp_path / "r.tif", ruler((1, 1)), mpp=mpp)
    with pytest.raises(
        PlanError, match=r"would be magnified .* times \(at most 1.1 allowed\): scan it finer"
    ):
        plan(path)
    assert plan(path, upsample_tolerance=1.0).mpp_effective == pytest.approx((0.5, 0.5), rel=0.01)
    assert plan(path, mpp=1.0).mpp_requested == 1.0


def test_aperio_level_is_taken_as_it_is(real_slide: Path) -> None:
    tiles = plan(real_slide)
    assert not tiles.resampled
    assert (tiles.mpp_effective, tiles.mpp_requested, tiles.mpp_source) == (
        (0.499, 0.499),
        0.5,
        "openslide.mpp",
    )
    assert not plan(real_slide, 0.496).resampled
    exact = plan(real_slide, 0.496, native_tolerance=0)
    assert exact.resampled
    assert exact.mpp_effective == pytest.approx((0.5, 0.5), rel=0.5 / 224)


def test_whole_factors_are_means(tmp_path: Path, picture: NDArray[np.uint8]) -> None:
    """At 0.252 mpp a tile's pixel is the mean of 2 x 2, not of 1.98 x 1.98."""
    tiles = plan(write_pyramid(tmp_path / "a.tif", picture[:512, :512], mpp=0.252, quality=100))
    assert (tiles.tile_size, tiles.read_size) == ((512, 512), (448, 448))
    assert tiles.mpp_effective == pytest.approx((0.504, 0.504))
    with open_slide(tiles.path) as slide:
        read = slide.read(0, (32, 32), (448, 448)).reshape(224, 2, 224, 2, 3)
    assert np.abs(next(read_tiles(tiles)).pixels[0] - read.mean(axis=(1, 3))).max() <= 0.5


def test_grid_is_row_major_and_covers_the_slide(real_slide: Path) -> None:
    tiles = plan(real_slide)
    assert tiles.coords.dtype == np.int64
    expected = [(x, y) for y in range(0, 2967, 256) for x in range(0, 2220, 256)]
    assert tiles.coords.tolist() == [list(corner) for corner in expected]
    assert tiles.patch_size_level0 == 256
    assert tiles.tile_size_level0 == (256, 256)


def test_tiles_of_nothing_are_not_planned(tmp_path: Path, picture: NDArray[np.uint8]) -> None:
    """784 px: a fourth tile would start at 768, and the middle that is read of it at 784, beyond the edge."""
    for width, columns in ((784, 3), (785, 4)):
        tiles = plan(write_pyramid(tmp_path / f"{width}.tif", picture[:256, :width]))
        assert len(tiles) == columns
        assert next(read_tiles(tiles)).valid.all()


def test_grid_starts_at_the_bounds(leica_slide: Path) -> None:
    tiles = plan(leica_slide)
    expected = [[x, y] for y in range(200, 900, 256) for x in range(300, 1300, 256)]
    assert tiles.coords.tolist() == expected


@pytest.mark.parametrize("mpp", [0.2201, 0.2527, 0.2437, 0.3333, 0.499, (0.25, 0.26), 0.13])
@pytest.mark.parametrize("levels", [(1,), (1, 2, 4)])
def test_no_two_tiles_share_an_index(
    tmp_path: Path, mpp: float | tuple[float, float], levels: tuple[int, ...]
) -> None:
    """Whatever a level's true fraction, the model's grid index (coords // tile size) is a tile's own."""
    path = write_pyramid(
        tmp_path / "r.tif", ruler((1, 1))[:64, :64], size=(9_999, 9_001), mpp=mpp, levels=levels
    )
    tiles = plan(path)
    index = tiles.coords // np.array(tiles.tile_size_level0)
    assert len(np.unique(index, axis=0)) == len(tiles)
    corners = (tiles.level_positions() - np.array(tiles.read_offset)) * tiles.downsample
    assert np.abs(tiles.coords - corners).max() <= 0.5


def test_tissue_fraction_is_exact(real_slide: Path) -> None:
    rng = np.random.default_rng(5)
    mask = rng.random((297, 222)) < 0.4
    tissue = TissueMask(mask, (10.0, 10.0), "test")
    with open_slide(real_slide) as slide:
        tiles = plan_tiles(slide, tissue, min_tissue=0)
    fine = np.kron(mask, np.ones((10, 10), bool))
    padded = np.zeros((12 * 256, 9 * 256), bool)
    padded[: fine.shape[0], : fine.shape[1]] = fine
    for (x, y), fraction in zip(tiles.coords, tiles.tissue, strict=True):
        assert fraction == pytest.approx(padded[y : y + 256, x : x + 256].mean(), abs=1e-6)


@pytest.mark.parametrize(("min_tissue", "kept"), [(0.0, 108), (0.1, 5), (0.46, 5), (0.5, 1), (0.8, 0)])
def test_tiles_follow_the_tissue(real_slide: Path, min_tissue: float, kept: int) -> None:
    mask = np.zeros((297, 222), bool)
    mask[:128, 13:25] = True  # 120 px of each of the five topmost tiles at the left: 0.469 ...
    mask[51:64, :13] = True  # ... and 0.254 more of the third
    with open_slide(real_slide) as slide:
        tiles = plan_tiles(slide, TissueMask(mask, (10.0, 10.0), "test"), min_tissue=min_tissue)
    assert len(tiles) == kept


def test_no_tissue_is_an_empty_plan(real_slide: Path) -> None:
    tissue = TissueMask(np.zeros((30, 22), bool), (100.0, 100.0), "test")
    with open_slide(real_slide) as slide:
        tiles = plan_tiles(slide, tissue)
    assert tiles.coords.shape == (0, 2)
    assert list(read_tiles(tiles)) == []


def test_fingerprint_changes_with_what_decides_the_pixels(real_slide: Path) -> None:
    base = plan(real_slide).fingerprint
    assert json.loads(json.dumps(base)) == base
    assert plan(real_slide).fingerprint == base
    for other in (
        plan(real_slide, 0.25),
        plan(real_slide, crop_px=256),
        plan(real_slide, mpp=1.0),
        plan(real_slide, 0.496, native_tolerance=0),
    ):
        assert other.fingerprint != base


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"crop_px": 300}, "give 0 < crop <= tile"),
        ({"crop_px": 0}, "give 0 < crop <= tile"),
        ({"mpp": 0.0}, "give a positive number"),
        ({"mpp": math.nan}, "give a positive number"),
        ({"min_tissue": 1.5}, "give 0 to 1"),
    ],
)
def test_senseless_options_are_refused(real_slide: Path, options: dict[str, float], said: str) -> None:
    with pytest.raises(PlanError, match=said):
        plan(real_slide, **options)


def test_a_grid_of_more_tiles_than_any_slide_has_is_refused(
    real_slide: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("client.slides.tiling.MOST_CELLS", 100)
    with (
        open_slide(real_slide) as slide,
        pytest.raises(PlanError, match="of over 100 tiles: check the slide's"),
    ):
        plan_tiles(slide, None)
    monkeypatch.setattr("client.slides.slide.MOST_OVERVIEW_PIXELS", 1e6)
    with open_slide(real_slide) as slide, pytest.raises(SlideError, match="convert it to a pyramid"):
        slide.overview(8)
