"""A slide's scale: which source wins, what is plausible, what an error says."""

from __future__ import annotations

import math

import pytest

from client.errors import MppError
from client.slides.mpp import Mpp, find_mpp

OPENSLIDE = {"openslide.mpp-x": "0.25", "openslide.mpp-y": "0.26"}
APERIO = {"aperio.MPP": "0.4990"}
TIFF = {"tiff.XResolution": "20000", "tiff.YResolution": "40000", "tiff.ResolutionUnit": "centimeter"}


@pytest.mark.parametrize(
    ("properties", "expected"),
    [
        (OPENSLIDE | APERIO | TIFF, Mpp(0.25, 0.26, "openslide.mpp")),
        (APERIO | TIFF, Mpp(0.499, 0.499, "aperio.MPP")),
        (TIFF, Mpp(0.5, 0.25, "tiff.Resolution")),
        (TIFF | {"tiff.ResolutionUnit": "inch"}, Mpp(1.27, 0.635, "tiff.Resolution")),
        ({"aperio.MPP": "0,2527"}, Mpp(0.2527, 0.2527, "aperio.MPP")),
        (
            {
                "mirax.LAYER_0_LEVEL_0_SECTION.MICROMETER_PER_PIXEL_X": "0.2325",
                "mirax.LAYER_0_LEVEL_0_SECTION.MICROMETER_PER_PIXEL_Y": "0.2327",
            },
            Mpp(0.2325, 0.2327, "mirax"),
        ),
        # What makes no sense is passed over, not believed.
        ({"openslide.mpp-x": "352.8", "openslide.mpp-y": "352.8"} | APERIO, Mpp(0.499, 0.499, "aperio.MPP")),
        ({"openslide.mpp-x": "0", "openslide.mpp-y": "0"} | APERIO, Mpp(0.499, 0.499, "aperio.MPP")),
        ({"openslide.mpp-x": "nan", "openslide.mpp-y": "x"} | APERIO, Mpp(0.499, 0.499, "aperio.MPP")),
    ],
)
def test_lookup_order(properties: dict[str, str], expected: Mpp) -> None:
    found = find_mpp(properties)
    assert found.source == expected.source
    assert found[:2] == pytest.approx(expected[:2], rel=1e-12)


def test_the_callers_word_goes_first() -> None:
    assert find_mpp(OPENSLIDE, 0.23) == Mpp(0.23, 0.23, "explicit")
    assert find_mpp({}, (0.23, 0.24)) == Mpp(0.23, 0.24, "explicit")


@pytest.mark.parametrize("mpp", [0, -0.5, math.nan, math.inf, 500, (0.5, 0.0)])
def test_an_implausible_word_is_refused(mpp: float | tuple[float, float]) -> None:
    with pytest.raises(MppError, match="not plausible: give microns per pixel"):
        find_mpp(OPENSLIDE, mpp)


@pytest.mark.parametrize(
    ("properties", "hint"),
    [
        ({}, "in the file: give --mpp or an mpp column in the manifest"),
        ({"openslide.objective-power": "40"}, "only a 40x objective, often about 0.25 mpp: give --mpp"),
        (
            {"openslide.mpp-x": "352.8", "openslide.mpp-y": "352.8"},
            "an implausible 352.8 in openslide.mpp",
        ),
        (
            {"tiff.XResolution": "72", "tiff.YResolution": "72"},
            "in the file: give --mpp",
        ),  # no unit
    ],
)
def test_none_names_the_remedy_and_never_guesses(properties: dict[str, str], hint: str) -> None:
    with pytest.raises(MppError) as error:
        find_mpp(properties)
    assert hint in str(error.value)
    assert "\n" not in str(error.value)
