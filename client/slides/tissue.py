"""Where the tissue is: a mask from colour, from an image file or from annotations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from shapely.geometry import Polygon, box

from ..arrays import Array, BinaryMask, Float32, Pixels
from ..errors import MaskError
from .contours import mask_contours, rasterise
from .geojson import Frame, frame_doubt, is_geojson, read_annotations
from .mask_image import read_mask_image
from .slide import Slide

MASK_MPP = 8.0  # microns per mask pixel: a tile is 16 of them wide
LONGEST_SIDE = 4096  # mask pixels: the mask of a huge slide gets coarser, not larger
SMALLEST_UM = 60.0  # specks and holes of less than half a tile's width are noise
# Deviation of optical density over 5 x 5 pixels, relative to it, under which these may be ink ...
SMOOTH = 0.04
SMOOTH_SHARE = 0.05  # ... and the share of such pixels in a patch of one hue from which on it is
# Two stains in one place may add up to grey. What is darker than this part of the glass's light, near colour
# and not smooth is tissue too, if there is much of it and unless it is about as dark as pen.
GREY, LIGHTER_THAN_PEN = 0.82, 0.35
MIXED_SHARE = 0.25  # of what has colour; in H&E it is 0.06
MOST_TISSUE = 0.95  # of a slide: more is implausible
CHROMA = (0.05, 0.15)  # where the threshold may lie, in optical density: above glass, below faint eosin


@dataclass(frozen=True, eq=False)
class TissueMask:
    """Tissue, bool [h, w], found in `source`; a pixel is `downsample` (x, y) level-0 pixels wide."""

    mask: BinaryMask
    downsample: tuple[float, float]
    source: str

    @property
    def fraction(self) -> float:
        """The part of the slide that is tissue, 0 to 1."""
        return float(self.mask.mean())

    def contours(self, bounds: tuple[int, int, int, int]) -> list[Polygon]:
        """The tissue's outlines, with holes, within a slide's `bounds`: level-0 pixels, large ones first."""
        return mask_contours(self.mask, self.downsample, bounds)


def tissue_mask(slide: Slide) -> TissueMask:
    """Find H&E tissue by colour, at about 8 microns per mask pixel.

    What cannot be decoded counts as tissue: its tiles are then planned, found not valid, and reported.
    """
    overview = slide.overview(_downsample(slide))
    micron = overview.downsample[0] * max(slide.mpp)
    parts = _parts(overview.pixels, SMALLEST_UM / micron)
    slide.notes += _doubts(parts)
    return TissueMask(parts.tissue | overview.unreadable, overview.downsample, "colour")


def segment(rgb: Pixels, smallest_px: float = SMALLEST_UM / MASK_MPP) -> BinaryMask:
    """Tissue in RGB uint8 [h, w, 3] on glass of any exposure and without pen marks, as bool [h, w].

    Stain is colour that remains when the background's own is divided out: the spread of optical density over
    the channels, cut at Otsu's threshold (1979). Specks and holes under `smallest_px` across are tidied away.
    """
    return _parts(rgb, smallest_px).tissue


class _Parts(NamedTuple):
    """What a slide shows, bool [h, w]: tissue, coloured pen, and what is dark and rough but has no colour."""

    tissue: BinaryMask
    pen: BinaryMask
    grey: BinaryMask
    glass: Float32  # its colour


def _parts(rgb: Pixels, smallest_px: float) -> _Parts:
    glass = _background(rgb)
    light = cv2.GaussianBlur(rgb, (3, 3), 0) / (glass + 1)
    light = np.clip(light, 0.05, 1).astype(np.float32)  # darker is the sensor's noise
    darkest, lightest = _extremes(light)
    chroma = np.log(lightest / darkest)
    pen = _smooth_strokes(_pen(light, lightest - darkest, lightest), light)
    coloured = chroma > np.clip(_otsu(chroma), *CHROMA)
    stained = coloured & ~pen
    grey = (lightest < GREY) & ~coloured & ~pen
    grey &= ~_smooth_strokes(grey, light)
    mixed = grey & (lightest > LIGHTER_THAN_PEN)
    mixed &= cv2.blur((stained & (lightest > LIGHTER_THAN_PEN)).astype(np.float32), (33, 33)) > 0.1
    if mixed.sum() > MIXED_SHARE * stained.sum():
        stained |= mixed
    tissue = _tidy(stained, smallest_px)
    return _Parts(tissue, coloured & pen, grey & ~tissue, glass)


def _doubts(parts: _Parts) -> list[str]:
    """What makes a mask implausible, each in a line."""
    tissue, pen, grey, glass = parts
    found, doubts = float(tissue.mean()), []
    ink = pen.sum() / max(1, pen.sum() + tissue.sum())
    if ink > 0.3:
        doubts.append(f"{ink:.0%} of what is coloured is taken for pen: give a mask, if it is a stain")
    if grey.mean() > 0.01 and (without := grey.sum() / (grey.sum() + tissue.sum())) > 0.3:
        doubts.append(
            f"{without:.0%} of what is dark has no colour and is taken for ink: give a mask, if it is a "
            "stain, such as silver"
        )
    if found > MOST_TISSUE:
        doubts.append(f"{found:.0%} of the slide is taken for tissue: give a mask, if it is not")
    if glass.max() < 128:
        doubts.append(
            f"dark: its glass has a brightness of {glass.max():.0f} of 255; tiles are not corrected"
        )
    return doubts


def mask_from_file(path: Path, slide: Slide, *, frame: Frame = "qupath") -> TissueMask:
    """Take tissue from GeoJSON annotations (.geojson, .json, either .gz) or from a mask image.

    `frame` is that of annotations, see `mask_from_annotations`.

    Raises:
        MaskError: see `mask_from_image` and `client.slides.geojson.read_annotations`.
    """
    if is_geojson(path):
        return mask_from_annotations(path, slide, frame=frame)
    return mask_from_image(path, slide)


def mask_from_image(path: Path, slide: Slide) -> TissueMask:
    """Take tissue from an image that covers the whole slide, see `mask_image.read_mask_image`.

    An image of the shape of the slide's bounds, and not of the slide, covers the bounds.

    Raises:
        MaskError: no readable image, or its proportions are not the slide's.
    """
    wanted = _mask_size(slide)
    drawn = read_mask_image(path, wanted, LONGEST_SIDE)
    height, width = drawn.shape
    left, top, *part = slide.bounds
    fits_bounds = (left, top, *part) != (0, 0, *slide.dimensions) and _has_shape(drawn, part)
    if _has_shape(drawn, slide.dimensions):
        if fits_bounds:
            slide.notes.append(f"mask {path.name} is taken for one of the whole slide, not of its bounds")
        if (stretch := _stretch(drawn, slide.dimensions)) > 1.5 * (1 / width + 1 / height):
            slide.notes.append(
                f"mask {path.name} is not quite of the slide's shape: stretched by {stretch:.1%}"
            )
    elif fits_bounds:
        placed = np.zeros(wanted[::-1], np.bool_)
        scale = [size / side for size, side in zip(wanted, slide.dimensions, strict=True)]
        x0, x1 = round(left * scale[0]), round((left + part[0]) * scale[0])
        y0, y1 = round(top * scale[1]), round((top + part[1]) * scale[1])
        area = cv2.resize(drawn.astype(np.uint8), (x1 - x0, y1 - y0), interpolation=cv2.INTER_NEAREST)
        placed[y0:y1, x0:x1] = area.astype(np.bool_)[: placed.shape[0] - y0, : placed.shape[1] - x0]
        drawn = placed
    else:
        size = "x".join(str(side) for side in slide.dimensions)
        raise MaskError(f"{path}: {width}x{height} px is not the shape of a {size} slide: cover all of it")
    if drawn.mean() > MOST_TISSUE:
        slide.notes.append(f"mask {path.name} covers {drawn.mean():.0%} of the slide: is its background 0?")
    height, width = drawn.shape
    return TissueMask(
        drawn, (slide.dimensions[0] / width, slide.dimensions[1] / height), f"image {path.name}"
    )


def mask_from_annotations(
    path: Path, slide: Slide, classes: frozenset[str] | None = None, *, frame: Frame = "qupath"
) -> TissueMask:
    """Take tissue from annotations; `classes` keeps those of these names only.

    `frame` says where (0, 0) lies on a slide with bounds: at theirs, as in QuPath, or at level 0's.

    Raises:
        MaskError: not GeoJSON, or no area in it that lies on the slide.
    """
    left, top, width, height = slide.bounds
    shape = read_annotations(path, origin=(left, top), frame=frame, classes=classes)
    if not shape.intersects(box(left, top, left + width, top + height)):
        other_frame = ", or the other --mask-frame" if (left, top) != (0, 0) else ""
        raise MaskError(
            f"{path}: none of its areas lies on the {width}x{height} px of the slide: give the one of this "
            f"slide{other_frame}"
        )
    if doubt := frame_doubt(path, shape, slide.bounds, frame):
        slide.notes.append(doubt)
    width, height = _mask_size(slide)
    downsample = (slide.dimensions[0] / width, slide.dimensions[1] / height)
    return TissueMask(rasterise(shape, downsample, (width, height)), downsample, f"annotations {path.name}")


def _downsample(slide: Slide) -> float:
    return max(1.0, MASK_MPP / max(slide.mpp), max(slide.dimensions) / LONGEST_SIDE)


def _mask_size(slide: Slide) -> tuple[int, int]:
    width, height = (max(1, round(side / _downsample(slide))) for side in slide.dimensions)
    return width, height


def _has_shape(mask: BinaryMask, size: Sequence[int]) -> bool:
    """Whether a mask is a picture of `size` (w, h) made smaller, to within a pixel or 2 %."""
    height, width = mask.shape
    return bool(_stretch(mask, size) <= max(0.02, 1 / width + 1 / height))


def _stretch(mask: BinaryMask, size: Sequence[int]) -> float:
    """By which part one side of a mask is stretched more than the other to cover `size` (w, h)."""
    height, width = mask.shape
    return float(abs(size[0] / width / (size[1] / height) - 1))


def _background(rgb: Pixels) -> Float32:
    """The colour of bare glass, whatever the exposure; of light without a tint where there is no glass.

    Glass is light and nearly grey, or tinted other than by stain, which takes most of the green. Of what
    could be glass, the brightest is it. Pure white, which readers fill with, counts if little else is there.
    """
    step = max(1, max(rgb.shape) // 1000)
    rgb = rgb[::step, ::step]
    darkest, lightest = _extremes(rgb)
    scanned = darkest < 255
    scanned = scanned if scanned.mean() > 0.05 else np.ones_like(scanned)
    exposure = float(np.percentile(lightest[scanned], 99))
    red, green, blue = cv2.split(rgb)
    tint = np.where(green > np.minimum(red, blue), 0.25, 0.1)
    glass = scanned & (lightest > 0.6 * exposure) & (lightest - darkest < tint * lightest)
    if glass.mean() < 0.01:
        return np.full(3, min(255.0, 1.05 * exposure), np.float32)
    brightest = glass & (lightest > 0.88 * np.percentile(lightest[glass], 90))
    return np.asarray(np.median(rgb[brightest], axis=0), np.float32)


def _otsu(values: Float32) -> float:
    hundredths = np.clip(values * 100, 0, 255).astype(np.uint8)
    return cv2.threshold(hundredths, 0, 255, cv2.THRESH_BINARY | cv2.THRESH_OTSU)[0] / 100


def _pen(light: Float32, spread: Float32, lightest: Float32) -> BinaryMask:
    """Ink: H&E's hue is violet to rose, 250 to 350 degrees, and it takes more green than red and blue."""
    hue, saturation, _ = cv2.split(cv2.cvtColor(light, cv2.COLOR_RGB2HSV))
    green = (hue > 70) & (hue <= 200) & (saturation > 0.15)
    blue = (hue > 200) & (hue < 250) & (saturation > np.where(hue < 235, 0.35, 0.45))
    black = (lightest < 0.3) & (spread < 0.08)
    in_red, in_green, in_blue = (-np.log(channel) for channel in cv2.split(light))
    red = (in_green > 0.4) & (in_red < 0.5 * in_green) & (abs(in_blue - 0.95 * in_green) < 0.15 * in_green)
    return np.asarray(green | blue | black | red)


def _smooth_strokes(pen: BinaryMask, light: Float32) -> BinaryMask:
    """Of what has the hue of ink, what is as smooth as ink, with its edges: stains of that hue are not."""
    if not pen.any():
        return pen
    density = -np.log(light).mean(axis=2)
    mean = cv2.blur(density, (5, 5))
    variance = cv2.blur(density * density, (5, 5)) - mean * mean
    smooth = pen & (variance < (SMOOTH * mean) ** 2)
    count, labels = cv2.connectedComponents(pen.astype(np.uint8), connectivity=8)
    share = np.bincount(labels[smooth], minlength=count) / np.maximum(
        1, np.bincount(labels.ravel(), minlength=count)
    )
    strokes = (share >= SMOOTH_SHARE)[labels] & pen
    edges = pen & (cv2.dilate(strokes.astype(np.uint8), _disc(8)) > 0)
    return np.asarray(cv2.dilate(edges.astype(np.uint8), _disc(2)) > 0)


def _extremes(pixels: Array) -> tuple[Array, Array]:
    """The darkest and the lightest channel of each pixel; NumPy is slow to reduce so short an axis itself."""
    red, green, blue = cv2.split(pixels)
    return np.minimum(np.minimum(red, green), blue), np.maximum(np.maximum(red, green), blue)


def _tidy(mask: BinaryMask, smallest_px: float) -> BinaryMask:
    """Close gaps, then drop specks and fill holes that are smaller than a disc of `smallest_px` across."""
    area = np.pi / 4 * smallest_px**2
    closed = cv2.morphologyEx(mask.astype(np.uint8), cv2.MORPH_CLOSE, _disc(max(1, round(smallest_px / 4))))
    return ~_large(~_large(closed > 0, area), area)


def _large(mask: BinaryMask, area: float) -> BinaryMask:
    """The connected parts of a mask that have at least `area` pixels."""
    _, labels, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=8)
    large = stats[:, cv2.CC_STAT_AREA] >= area
    large[0] = False
    return np.asarray(large[labels], np.bool_)


def _disc(radius: int) -> Pixels:
    return np.asarray(
        cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * radius + 1, 2 * radius + 1)), np.uint8
    )
