"""Microns per pixel of a slide's level 0, from what the file says."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

from client.errors import MppError

Properties = Mapping[str, str]

# Beyond these a header's figure is no scanner's: a photo's 72 dpi would be 353 um per px.
PLAUSIBLE = (0.02, 20.0)
MICRONS_PER_UNIT = {"inch": 25_400.0, "centimeter": 10_000.0, "cm": 10_000.0}


class Mpp(NamedTuple):
    """Microns per level-0 pixel and the name of the source that said so."""

    x: float
    y: float
    source: str


def find_mpp(properties: Properties, explicit: float | tuple[float, float] | None = None) -> Mpp:
    """Look the scale up: the caller's word, then OpenSlide's, then the vendors' own, then TIFF's resolution.

    The objective's power alone is never trusted: at "20x" scanners range from 0.44 to 0.55 mpp.

    Raises:
        MppError: nothing usable was found, or `explicit` is not a plausible scale.
    """
    if explicit is not None:
        x, y = explicit if isinstance(explicit, tuple) else (explicit, explicit)
        if not (_plausible(x) and _plausible(y)):
            low, high = PLAUSIBLE
            raise MppError(f"{explicit} is no plausible mpp: give microns per level-0 pixel, {low} to {high}")
        return Mpp(float(x), float(y), "explicit")
    for source, look in _SOURCES.items():
        pair = look(properties)
        if pair is not None and _plausible(pair[0]) and _plausible(pair[1]):
            return Mpp(*pair, source)
    raise MppError(
        f"no microns per pixel in the file: give --mpp or an mpp column in the manifest{_hint(properties)}"
    )


def objective_power(properties: Properties) -> float | None:
    """The objective's nominal magnification, where the file names one."""
    return _number(properties, "openslide.objective-power")


def _hint(properties: Properties) -> str:
    power = objective_power(properties)
    return f" (it names a {power:g}x objective: often about {10 / power:g} mpp)" if power else ""


def _plausible(mpp: float) -> bool:
    return math.isfinite(mpp) and PLAUSIBLE[0] <= mpp <= PLAUSIBLE[1]


def _number(properties: Properties, key: str) -> float | None:
    try:
        value = float(properties[key].replace(",", "."))
    except (KeyError, ValueError):
        return None
    return value if math.isfinite(value) and value > 0 else None


def _pair(key_x: str, key_y: str) -> Callable[[Properties], tuple[float, float] | None]:
    def look(properties: Properties) -> tuple[float, float] | None:
        x, y = _number(properties, key_x), _number(properties, key_y)
        return (x, y) if x and y else None

    return look


def _pixels_per_unit(prefix: str) -> Callable[[Properties], tuple[float, float] | None]:
    def look(properties: Properties) -> tuple[float, float] | None:
        unit = MICRONS_PER_UNIT.get(properties.get("tiff.ResolutionUnit", "").lower())
        x, y = _number(properties, f"{prefix}.XResolution"), _number(properties, f"{prefix}.YResolution")
        return (unit / x, unit / y) if unit and x and y else None

    return look


_SOURCES: dict[str, Callable[[Properties], tuple[float, float] | None]] = {
    "openslide.mpp": _pair("openslide.mpp-x", "openslide.mpp-y"),
    "aperio.MPP": _pair("aperio.MPP", "aperio.MPP"),
    "mirax": _pair(
        "mirax.LAYER_0_LEVEL_0_SECTION.MICROMETER_PER_PIXEL_X",
        "mirax.LAYER_0_LEVEL_0_SECTION.MICROMETER_PER_PIXEL_Y",
    ),
    "openslide.mirax.MPP": _pair("openslide.mirax.MPP", "openslide.mirax.MPP"),
    "hamamatsu.Resolution": _pixels_per_unit("hamamatsu"),
    "tiff.Resolution": _pixels_per_unit("tiff"),
}
