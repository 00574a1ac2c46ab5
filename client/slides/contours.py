"""Between a mask's pixels and polygons in level-0 pixels."""

from __future__ import annotations

from collections.abc import Iterator

import cv2
import numpy as np
import shapely
from shapely.geometry import MultiPoint, Polygon
from shapely.geometry.base import BaseGeometry

from ..arrays import BinaryMask, Float64, Int32

SHIFT = 4  # cv2 takes vertices in fixed point, here 1/16 mask pixel


def rasterise(geometry: BaseGeometry, downsample: tuple[float, float], size: tuple[int, int]) -> BinaryMask:
    """Draw a shape in level-0 pixels, holes left out, as bool [h, w]; `size` is (w, h).

    A mask pixel is `downsample` (x, y) level-0 pixels wide; those that the outline touches belong to the
    shape.
    """
    mask = np.zeros((size[1], size[0]), np.bool_)
    for polygon in shapely.get_parts(geometry):
        if isinstance(polygon, Polygon):
            # cv2 counts from the first pixel's centre, a mask from its corner.
            drawn = [ring / downsample - 0.5 for ring in rings(polygon)]
            canvas = np.zeros(mask.shape, np.uint8)
            cv2.fillPoly(
                canvas, [np.rint(r * (1 << SHIFT)).astype(np.int32) for r in drawn], 1, cv2.LINE_8, SHIFT
            )
            mask |= canvas.astype(np.bool_)
    return mask


def mask_contours(
    mask: BinaryMask, downsample: tuple[float, float], bounds: tuple[int, int, int, int] | None = None
) -> list[Polygon]:
    """Outline a mask bool [h, w], holes included: valid polygons in level-0 pixels, large ones first.

    Straight borders are exact; a corner that points inwards is cut by half a mask pixel. What lies outside
    `bounds` (x, y, width, height in level-0 pixels) is left out.
    """
    height, width = mask.shape
    x, y, w, h = bounds or (0, 0, width * downsample[0], height * downsample[1])
    edge = shapely.box(*(np.array([x, y, x + w, y + h]) / np.tile(downsample, 2) - 0.5))
    found, tree = cv2.findContours(mask.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    outer: dict[int, Int32] = {}
    holes: dict[int, list[Int32]] = {}
    for index, ring in enumerate(found):
        parent = int(tree[0][index][3])
        vertices = np.asarray(ring[:, 0], np.int32)
        if parent < 0:
            outer[index] = vertices
        else:
            holes.setdefault(parent, []).append(vertices)
    polygons: list[Polygon] = []
    for index, vertices in outer.items():
        polygons += _outline(vertices, holes.get(index, []), downsample, edge)
    return sorted(polygons, key=lambda polygon: -polygon.area)


def _outline(
    ring: Int32, holes: list[Int32], downsample: tuple[float, float], edge: Polygon
) -> list[Polygon]:
    # cv2's vertices are the centres of the mask's own outer pixels: their border lies half a pixel outwards.
    centres = shapely.make_valid(Polygon(ring, holes)) if len(ring) > 2 else MultiPoint(ring).convex_hull
    grown = centres.buffer(0.5, cap_style="square", join_style="mitre")
    # A mitre can reach past the mask's edge, which is the slide's, and a mask pixel past its bounds.
    grown = grown.intersection(edge)
    scaled = shapely.transform(grown, lambda points: (points + 0.5) * np.array(downsample))
    parts = shapely.get_parts(shapely.make_valid(scaled))
    return [part for part in shapely.get_parts(parts) if isinstance(part, Polygon)]


def rings(geometry: BaseGeometry) -> Iterator[Float64]:
    """The vertices [n, 2] of every outline of a geometry's polygons, holes included."""
    for part in shapely.get_parts(geometry):
        if isinstance(part, Polygon):
            for ring in (part.exterior, *part.interiors):
                yield np.asarray(ring.coords)[:, :2]
