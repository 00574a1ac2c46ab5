"""Masks to polygons and back."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import shapely
from shapely.geometry import MultiPolygon, Polygon, box

from client.slides.contours import mask_contours, rasterise


def test_outline_runs_along_the_pixels_border() -> None:
    mask = np.zeros((40, 60), bool)
    mask[10:20, 30:50] = True
    (polygon,) = mask_contours(mask, (16.0, 8.0))
    assert polygon.equals(box(30 * 16, 10 * 8, 50 * 16, 20 * 8))


def test_holes_and_order() -> None:
    mask = np.zeros((60, 60), bool)
    mask[5:45, 5:45] = True
    mask[15:25, 15:25] = False
    mask[18:22, 18:22] = True  # an island in the hole
    mask[50:55, 50:55] = True
    large, *small = mask_contours(mask, (1.0, 1.0))
    exact = box(5, 5, 45, 45).difference(box(15, 15, 25, 25))
    assert large.symmetric_difference(exact).area <= 4 * 0.5  # the hole's corners
    assert len(large.interiors) == 1
    assert [polygon.area for polygon in small] == [25, 16]


@pytest.mark.parametrize("shape", [(1, 1), (1, 6), (5, 1)])
def test_lines_and_dots_have_an_area(shape: tuple[int, int]) -> None:
    mask = np.zeros((20, 20), bool)
    mask[8 : 8 + shape[0], 8 : 8 + shape[1]] = True
    (polygon,) = mask_contours(mask, (2.0, 2.0))
    assert polygon.area == pytest.approx(4 * shape[0] * shape[1], rel=0.3)


def test_nothing_has_no_outline() -> None:
    assert mask_contours(np.zeros((5, 5), bool), (1.0, 1.0)) == []


def test_there_and_back() -> None:
    rng = np.random.default_rng(2)
    for _ in range(20):
        mask = cv2.GaussianBlur(rng.normal(size=(200, 300)), (0, 0), 6) > 0.01
        polygons = mask_contours(mask, (16.0, 8.0))
        assert all(polygon.is_valid for polygon in polygons)
        assert sum(polygon.area for polygon in polygons) == pytest.approx(mask.sum() * 16 * 8, rel=0.02)
        back = rasterise(shapely.union_all(polygons), (16.0, 8.0), (300, 200))
        assert not (mask & ~back).any()
        assert not (back & ~cv2.dilate(mask.astype(np.uint8), np.ones((3, 3))).astype(bool)).any()


def test_rasterise_leaves_holes_out() -> None:
    ring = box(20, 20, 80, 80).difference(box(40, 40, 60, 60))
    mask = rasterise(MultiPolygon([ring, box(85, 85, 95, 95)]), (1.0, 1.0), (100, 100))
    assert mask.sum() == pytest.approx(60**2 - 20**2 + 10**2, rel=0.06)
    assert not mask[45:55, 45:55].any()
    assert mask[86:94, 86:94].all()


def test_rasterise_clips_at_the_edge() -> None:
    mask = rasterise(Polygon([(-50, -50), (30, -50), (30, 30), (-50, 30)]), (1.0, 1.0), (100, 100))
    assert mask.sum() == pytest.approx(30 * 30, rel=0.08)


def test_no_outline_leaves_the_mask() -> None:
    for seed in range(40):  # ragged masks that touch every edge
        mask = np.random.default_rng(seed).random((12, 17)) < 0.5
        for polygon in mask_contours(mask, (4.0, 2.0)):
            west, north, east, south = polygon.bounds
            assert (west >= 0, north >= 0, east <= 17 * 4, south <= 12 * 2) == (True,) * 4
            assert polygon.is_valid
