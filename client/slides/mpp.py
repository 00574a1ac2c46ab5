"""Microns per pixel of a slide's level 0, from what the file says."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

from ..errors import MppError

Properties = Mapping[str, str]
Look = Callable[[Properties], tuple[float, float] | None]

# No scanner is outside this range; a photo's 72 dpi would be 353 microns per pixel.
PLAUSIBLE = (0.02, 20.0)
MICRONS_PER_UNIT = {"inch": 25_400.0, "centimeter": 10_000.0}


class Mpp(NamedTuple):
    """Microns per level-0 pixel, and the name of the property they come from."""

    x: float
    y: float
    source: str


def find_mpp(properties: Properties, explicit: float | tuple[float, float] | None = None) -> Mpp:
    """Look the scale up: `explicit`, then OME-TIFF's, OpenSlide's property, the vendors' own, TIFF's tags.

    The objective's power is only a hint in the error message: scanners of "20x" range from 0.44 to 0.55 mpp.

    Raises:
        MppError: nothing usable was found, or `explicit` is not a plausible scale.
    """
    if explicit is not None:
        x, y = explicit if isinstance(explicit, tuple) else (explicit, explicit)
        if not _plausible((x, y)):
            low, high = PLAUSIBLE
            raise MppError(f"an mpp of {explicit} is not plausible: give microns per pixel, {low} to {high}")
        return Mpp(float(x), float(y), "explicit")
    found = {source: pair for source, look in SOURCES.items() if (pair := look(properties)) is not None}
    for source, pair in found.items():
        if _plausible(pair):
            return Mpp(*pair, source)
    raise MppError(
        f"no microns per pixel in the file{_hint(properties, found)}: "
        "give --mpp or an mpp column in the manifest"
    )


def contradictions(properties: Properties, mpp: tuple[float, float]) -> list[str]:
    """One line if `mpp`, which is used, differs by over 5 % from what the file says.

    That is its own scale, and of OME-TIFF also that of TIFF's tags, which other readers may use.
    """
    found = {source: pair for source, look in SOURCES.items() if (pair := look(properties))}
    own = [source for source, pair in found.items() if _plausible(pair)]
    for source in own if own[:1] == [_OME] else own[:1]:
        if max(abs(math.log(a / b)) for a, b in zip(mpp, found[source], strict=True)) > math.log(1.05):
            says = f"the file says {found[source][0]:g} ({source})"
            return [f"{mpp[0]:g} mpp is used, {says}: correct the one that is wrong"]
    return []


def objective_power(properties: Properties) -> float | None:
    """The objective's nominal magnification, where the file names one."""
    return _number(properties, "openslide.objective-power")


def _hint(properties: Properties, found: Mapping[str, tuple[float, float]]) -> str:
    power = objective_power(properties)
    if power:
        return f", only a {power:g}x objective, often about {10 / power:g} mpp"
    for source, pair in found.items():
        return f", only an implausible {pair[0]:g} in {source}"
    return ""


def _plausible(pair: tuple[float, float]) -> bool:
    return all(PLAUSIBLE[0] <= mpp <= PLAUSIBLE[1] for mpp in pair)  # false for nan too


def _number(properties: Properties, key: str) -> float | None:
    try:
        # Some scanners write the decimal comma of their locale.
        value = float(properties[key].replace(",", "."))
    except (KeyError, ValueError):
        return None
    return value if math.isfinite(value) and value > 0 else None


def _microns(key_x: str, key_y: str) -> Look:
    def look(properties: Properties) -> tuple[float, float] | None:
        x, y = _number(properties, key_x), _number(properties, key_y)
        return (x, y) if x and y else None

    return look


def _resolution(prefix: str) -> Look:
    pixels_per_unit = _microns(f"{prefix}.XResolution", f"{prefix}.YResolution")

    def look(properties: Properties) -> tuple[float, float] | None:
        unit = MICRONS_PER_UNIT.get(properties.get("tiff.ResolutionUnit", "").lower())
        pair = pixels_per_unit(properties)
        return (unit / pair[0], unit / pair[1]) if unit and pair else None

    return look


def _ome(properties: Properties) -> tuple[float, float] | None:
    """PhysicalSizeX and -Y of the first image in an OME-TIFF's XML."""
    description = properties.get("tiff.ImageDescription", properties.get("openslide.comment", ""))
    if not (pixels := _OME_PIXELS.search(description)):
        return None
    found = dict(_ATTRIBUTE.findall(pixels[0]))
    sizes = []
    for axis in "XY":
        unit = _MICRONS_PER_OME_UNIT.get(found.get(f"PhysicalSize{axis}Unit", "µm"))
        size = _number(found, f"PhysicalSize{axis}")
        if unit is None or size is None:
            return None
        sizes.append(size * unit)
    return sizes[0], sizes[1]


_OME_PIXELS = re.compile(r"<(?:\w+:)?Pixels\b[^>]*>")
_ATTRIBUTE = re.compile(r"""(\w+)\s*=\s*["']([^"']*)["']""")
_MICRONS_PER_OME_UNIT = {"µm": 1.0, "μm": 1.0, "um": 1.0, "nm": 1e-3, "mm": 1e3, "cm": 1e4, "m": 1e6}
_OME = "ome.PhysicalSize"
_MIRAX = "mirax.LAYER_0_LEVEL_0_SECTION.MICROMETER_PER_PIXEL_"

SOURCES: dict[str, Look] = {
    _OME: _ome,  # before TIFF's tags, which OpenSlide takes
    "openslide.mpp": _microns("openslide.mpp-x", "openslide.mpp-y"),
    "aperio.MPP": _microns("aperio.MPP", "aperio.MPP"),
    "mirax": _microns(f"{_MIRAX}X", f"{_MIRAX}Y"),
    "openslide.mirax.MPP": _microns("openslide.mirax.MPP", "openslide.mirax.MPP"),
    "hamamatsu.Resolution": _resolution("hamamatsu"),
    "tiff.Resolution": _resolution("tiff"),
}
