"""The evidence of an explanation in words, arrays and areas."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import shapely

from ...arrays import Float64, Int64
from ...slides.geojson import Feature, area_feature, write_feature_collection
from ..evidence import Evidence
from ..explain import Explanation

COLOURS = {"sufficient": (200, 30, 60), "necessary": (240, 150, 20)}


def sets(evidence: Evidence) -> dict[str, tuple[Int64, float]]:
    """The sets that were found, by name: their tiles and the output that shows what they are."""
    found = {
        "sufficient": (evidence.sufficient, evidence.alone),
        "necessary": (evidence.necessary, evidence.without),
    }
    return {name: (tiles, output) for name, (tiles, output) in found.items() if tiles is not None}


def extent(explanation: Explanation, tiles: Int64) -> dict[str, float]:
    """How much of the slide some tiles are: number, share of the tissue and, where known, area in mm²."""
    found = {"tiles": float(len(tiles)), "share": len(tiles) / len(explanation.slide.coords)}
    cell = explanation.slide.cell_mm2
    return found if cell is None else found | {"mm2": len(tiles) * cell}


def evidence_lines(explanation: Explanation) -> list[str]:
    """What suffices for the class, what it needs, and whether it survives without the former."""
    evidence, name = explanation.evidence, explanation.target_class
    if evidence is None:
        return []
    scores = {"sufficient": "alone score", "necessary": "the slide without them scores"}
    lines = [
        f"{kind} for {name}: {_size(extent(explanation, tiles))}; {scores[kind]} {output:+.3g}"
        for kind, (tiles, output) in sets(evidence).items()
    ]
    if evidence.sufficient is None:
        lines.append(f"sufficient for {name}: only the whole slide")
    else:
        kept = "still" if evidence.recoverable else "no longer"
        lines.append(f"without the sufficient tiles the slide is {kept} called {name} ({evidence.rest:+.3g})")
    if evidence.necessary is None:
        lines.append(f"necessary for {name}: none, the slide is called {name} without any tile")
    elif evidence.empty_called:
        lines.append(f"the empty slide is called {name} too: that few tiles suffice shows little")
    return lines


def evidence_arrays(explanation: Explanation) -> dict[str, tuple[Float64, dict[str, float]]]:
    """For each set, 1 for its tiles and 0 for the others [N], and the attributes of the array."""
    evidence = explanation.evidence
    arrays = {}
    for kind, (tiles, output) in ({} if evidence is None else sets(evidence)).items():
        inside = np.zeros(len(explanation.slide.coords))
        inside[tiles] = 1
        arrays[kind] = inside, extent(explanation, tiles) | {"output": output}
    return arrays


def write_evidence(path: Path, explanation: Explanation, origin: tuple[int, int]) -> None:
    """Write each set as an annotation for QuPath, as GeoJSON; `origin`: QuPath's (0, 0) in level-0 px.

    Raises:
        OutputError: the file can't be written.
    """
    write_feature_collection(path, _features(explanation, origin))


def _features(explanation: Explanation, origin: tuple[int, int]) -> Iterator[Feature]:
    slide = explanation.slide
    for kind, (inside, measurements) in evidence_arrays(explanation).items():
        low = slide.coords[inside > 0] - np.array(origin)
        boxes = shapely.box(*low.T, *(low + np.array(slide.tile_size)).T, ccw=False)
        yield area_feature(
            shapely.union_all(boxes),
            slide.slide_id,
            f"{explanation.target_class}: {kind}",
            COLOURS[kind],
            measurements,
        )


def _size(measured: dict[str, float]) -> str:
    count = f"{measured['tiles']:.0f} tile{'s' * (measured['tiles'] != 1)}"
    area = f"{measured['mm2']:.3g} mm², " if "mm2" in measured else ""
    return f"{count} ({area}{measured['share']:.2%} of the tissue)"
