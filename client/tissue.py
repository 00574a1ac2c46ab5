"""Where the tissue is: a mask from colour, from an image file or from annotations, and the contours of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
import shapely
from shapely.geometry import MultiPoint, Polygon
from shapely.geometry.base import BaseGeometry

from client.errors import MaskError
from client.slide import Pixels, Slide

Mask = npt.NDArray[np.bool_]

MASK_MPP = 8.0  # microns per mask pixel: 16 mask pixels a tile side
MAX_SIDE = 4096  # mask pixels; a mask of a huge slide gets coarser instead of larger
SMALLEST_UM = 60.0  # specks and holes narrower than about half a tile are noise
CHROMA_RANGE = (0.05, 0.15)  # Otsu's threshold is kept within: optical density, background to faint eosin


@dataclass(frozen=True)
class TissueMask:
    """Tissue as bool [h, w]; a mask pixel is `downsample` (x, y) level-0 pixels wide; `source` says who drew it."""

    mask: Mask
    downsample: tuple[float, float]
    source: str

    @property
    def fraction(self) -> float:
        """The part of the slide that is tissue, 0 to 1."""
        return float(self.mask.mean()) if self.mask.size else 0.0

    def contours(self) -> list[Polygon]:
        """The tissue's outlines with their holes, in level-0 pixels, large ones first."""
        return mask_contours(self.mask, self.downsample)


def tissue_mask(slide: Slide) -> TissueMask:
    """Find H&E tissue by colour, about 8 microns a mask pixel."""
    downsample = max(MASK_MPP / max(slide.mpp), max(slide.dimensions) / MAX_SIDE)
    overview = slide.overview(downsample)
    micron = overview.downsample[0] * slide.mpp[0]
    return TissueMask(segment(overview.pixels, SMALLEST_UM / micron), overview.downsample, "colour")


def segment(rgb: Pixels, smallest_px: float = 8.0) -> Mask:
    """Tissue in RGB uint8 [h, w, 3] on any light background, without pen marks, as bool [h, w].

    Stain is what has colour once the background's own is divided out: the spread of optical density over the
    three channels, cut by Otsu's threshold. Black pen has no spread, other pens have hues that no H&E stain has.
    """
    background = _background(rgb)
    smooth = cv2.GaussianBlur(rgb, (3, 3), 0)
    light = np.clip((smooth.astype(np.float32) + 1) / (background + 1), 0, 1)
    density = -np.log(light)
    chroma = density.max(axis=2) - density.min(axis=2)
    tissue = chroma > np.clip(_otsu(chroma), *CHROMA_RANGE)
    pen = _pen(light)
    tissue &= ~cv2.dilate(pen.astype(np.uint8), _disc(2)).astype(bool)
    return _tidy(tissue, smallest_px)


def _background(rgb: Pixels) -> npt.NDArray[np.float32]:
    """The colour of bare glass: the median of what is light and nearly grey; white where there is none."""
    low, high = rgb.min(axis=2).astype(np.int16), rgb.max(axis=2).astype(np.int16)
    glass = (high > 150) & (high - low < 0.1 * high)
    if glass.mean() < 0.01:
        return np.full(3, 255, np.float32)
    return np.median(rgb[glass], axis=0).astype(np.float32)


def _otsu(values: npt.NDArray[np.float32]) -> float:
    scaled = np.clip(values * 100, 0, 255).astype(np.uint8)
    return cv2.threshold(scaled, 0, 255, cv2.THRESH_BINARY | cv2.THRESH_OTSU)[0] / 100


def _pen(light: npt.NDArray[np.float32]) -> Mask:
    """Ink by hue: H&E lies between violet and rose, 250 to 350 degrees; green, blue and pure red are pens'."""
    hue, saturation, _ = np.moveaxis(cv2.cvtColor(light, cv2.COLOR_RGB2HSV), 2, 0)
    green = (hue > 70) & (hue <= 200) & (saturation > 0.15)
    blue = (hue > 200) & (hue < 250) & (saturation > 0.45)
    red = ((hue > 352) | (hue < 12)) & (saturation > 0.75)
    return green | blue | red


def _tidy(mask: Mask, smallest_px: float) -> Mask:
    """Close gaps, drop specks and fill holes smaller than a disc of `smallest_px` across."""
    area = np.pi / 4 * smallest_px**2
    closed = cv2.morphologyEx(mask.astype(np.uint8), cv2.MORPH_CLOSE, _disc(max(1, round(smallest_px / 4))))
    return ~_without_small(~_without_small(closed.astype(bool), area), area)


def _without_small(mask: Mask, area: float) -> Mask:
    _, labels, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=8)
    large = stats[:, cv2.CC_STAT_AREA] >= area
    large[0] = False
    return large[labels]


def _disc(radius: int) -> npt.NDArray[np.uint8]:
    return cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * radius + 1, 2 * radius + 1))


def mask_from_image(path: Path, slide: Slide) -> TissueMask:
    """Take a mask from an image file that covers the whole slide; every non-black pixel is tissue.

    Raises:
        MaskError: no readable image, or its proportions are not the slide's (within 2 %).
    """
    image = cv2.imread(str(path), cv2.IMREAD_UNCHANGED) if path.is_file() else None
    if image is None:
        raise MaskError(
            f"{path}: no readable mask image: give a PNG or TIFF as wide and high as the slide, made small"
        )
    colours = image[..., :3] if image.ndim == 3 else image[..., None]
    height, width = image.shape[:2]
    downsample = (slide.dimensions[0] / width, slide.dimensions[1] / height)
    if abs(downsample[0] / downsample[1] - 1) > max(0.02, 1 / width + 1 / height):
        raise MaskError(
            f"{path}: {width}x{height} px does not fit a slide of {slide.dimensions[0]}x{slide.dimensions[1]}: "
            "the mask must cover the whole slide"
        )
    return TissueMask(colours.max(axis=2) > 0, downsample, f"image {path.name}")


def mask_from_geometry(geometry: BaseGeometry, slide: Slide, source: str) -> TissueMask:
    """Draw a shape in level-0 pixels, holes included, into a mask."""
    factor = max(MASK_MPP / max(slide.mpp), max(slide.dimensions) / MAX_SIDE)
    width, height = (max(1, round(side / factor)) for side in slide.dimensions)
    downsample = (slide.dimensions[0] / width, slide.dimensions[1] / height)
    return TissueMask(rasterise(geometry, downsample, (width, height)), downsample, source)


def rasterise(geometry: BaseGeometry, downsample: tuple[float, float], size: tuple[int, int]) -> Mask:
    """Bool [h, w] of the pixels whose centre lies in `geometry` (level-0 pixels); `size` is (w, h)."""
    shift = 8  # cv2 takes fixed-point vertices: 1/256 mask pixel
    canvas = np.zeros((size[1], size[0]), np.uint8)
    for part in shapely.get_parts(geometry):
        if isinstance(part, Polygon) and not part.is_empty:
            rings = [part.exterior, *part.interiors]
            vertices = [
                np.round((np.asarray(r.coords)[:, :2] / downsample - 0.5) * (1 << shift)).astype(np.int32)
                for r in rings
            ]
            layer = np.zeros_like(canvas)
            cv2.fillPoly(layer, vertices, 1, cv2.LINE_8, shift)
            canvas |= layer
    return canvas.astype(bool)


def mask_contours(mask: Mask, downsample: tuple[float, float]) -> list[Polygon]:
    """Outlines of a mask, holes included, as valid polygons in level-0 pixels, large ones first."""
    found, tree = cv2.findContours(mask.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    holes: dict[int, list[npt.NDArray[np.int32]]] = {}
    for ring, (_, _, _, parent) in zip(found, tree[0] if tree is not None else (), strict=True):
        if parent >= 0:
            holes.setdefault(parent, []).append(ring[:, 0])
    polygons: list[Polygon] = []
    for index, ring in enumerate(found):
        if tree[0][index][3] < 0:
            polygons += _outline(ring[:, 0], holes.get(index, []), downsample)
    return sorted(polygons, key=lambda polygon: polygon.area, reverse=True)


def _outline(
    ring: npt.NDArray[np.int32], holes: list[npt.NDArray[np.int32]], downsample: tuple[float, float]
) -> list[Polygon]:
    # cv2's vertices are centres of the mask's own pixels: half a pixel outwards lies the border.
    centres = shapely.make_valid(Polygon(ring, holes)) if len(ring) > 2 else MultiPoint(ring).convex_hull
    grown = centres.buffer(0.5, cap_style="square", join_style="mitre")
    scaled = shapely.transform(grown, lambda points: (points + 0.5) * downsample)
    return [part for part in shapely.get_parts(scaled) if isinstance(part, Polygon)]
