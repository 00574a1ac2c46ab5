"""`tissue`: a cohort's tissue before any server, corrected by hand and taken up by a batch."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from client.outputs.layout import Layout
from gigapath_contract.schema import Contract
from tests.support.pyramid import write_pyramid

Run = Callable[..., Any]


def rows_of(path: Path) -> dict[str, dict[str, str]]:
    with path.open() as file:
        return {row["slide_id"]: row for row in csv.DictReader(file)}


def test_tissue_is_found_corrected_and_taken_up(
    slides: Path, triton_url: str, contract: Contract, run_client: Run, tmp_path: Path
) -> None:
    write_pyramid(tmp_path / "blank.tif", np.full((1024, 1024, 3), 240, np.uint8), levels=(1, 4))
    (tmp_path / "cohort.csv").write_text(
        f"slide_id,path\na,{slides / 'a.tif'}\nblank,blank.tif\ngone,gone.tif\n"
    )
    out = tmp_path / "tissue"
    done = run_client("tissue", tmp_path / "cohort.csv", "--out", out)
    assert done.code == 1  # one slide is missing
    assert f"next: gigapath-client batch {out / 'tissue.csv'} --out {tmp_path / 'results'}\n" in done.out
    found = rows_of(out / "tissue.csv")
    states = {name: row["tissue_status"] for name, row in found.items()}
    assert states == {"a": "ok", "blank": "degraded", "gone": "failed"}
    with Image.open(out / "masks" / "a.png") as mask:
        share = (np.asarray(mask.convert("L")) > 0).mean()
    assert abs(share - float(found["a"]["tissue"])) < 1e-3
    assert (out / "thumbnails" / "a.jpg").stat().st_size > 0
    # Someone draws a smaller area in QuPath; a second run keeps it and counts its tiles.
    outlines = out / "tissue_geojson" / "a.geojson"
    drawn = json.loads(outlines.read_text())["features"][:1]
    drawn[0]["geometry"] = {
        "type": "Polygon",
        "coordinates": [[[0, 0], [512, 0], [512, 512], [0, 512], [0, 0]]],
    }
    outlines.write_text(json.dumps({"type": "FeatureCollection", "features": drawn}))
    assert run_client("tissue", slides / "a.tif", "--out", out).code == 0
    corrected = rows_of(out / "tissue.csv")["a"]
    assert 4 <= int(corrected["tiles"]) < int(found["a"]["tiles"])
    assert json.loads(outlines.read_text())["features"][0]["geometry"] == drawn[0]["geometry"]
    batch = run_client("batch", out / "tissue.csv", "--out", tmp_path / "out", "--url", triton_url)
    assert batch.code == 0, batch.err
    assert rows_of(Layout(tmp_path / "out", contract).status)["a"]["tiles"] == corrected["tiles"]
    (tmp_path / "gone.csv").write_text("slide_id,path\ngone,gone.tif\n")
    none_found = run_client("tissue", tmp_path / "gone.csv", "--out", tmp_path / "none")
    assert none_found.code == 1
    assert "next:" not in none_found.out
    assert run_client("tissue", slides / "a.tif", "--out", out, "--overwrite").code == 0
    assert rows_of(out / "tissue.csv")["a"]["tiles"] == found["a"]["tiles"]
