"""The viewer's server: what it shows, what it refuses, and how it says what is wrong."""

from __future__ import annotations

import base64
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from starlette.applications import Starlette

from client.outputs.records import read_record, write_record
from client.viewer.app import create_app
from client.viewer.library import Library
from tests.client.viewer.conftest import Get

ID = "CMU-1-Small-Region"


@pytest.fixture
def app(explained: Path) -> Starlette:
    return create_app(Library((explained,)))


@pytest.fixture
def out(explained: Path, tmp_path: Path) -> Path:
    """A copy of the results, to be changed."""
    return Path(shutil.copytree(explained, tmp_path / "out"))


def slide(get: Get, folder: Path, key: str = ID, **options: Any) -> Any:
    """What the server says of a slide."""
    return json.loads(get(create_app(Library((folder,), **options)), f"/api/slides/{key}").body)


def test_a_slide_comes_with_tiles_maps_trust_and_evidence(get: Get, app: Starlette, explained: Path) -> None:
    found = json.loads(get(app, f"/api/slides/{ID}").body)
    with h5py.File(explained / f"{ID}.h5") as file:
        stored = file["attribution_partition_shap"]
        values, floor = stored[:], stored.attrs["noise_floor"]
    (first, *others) = found["maps"]
    data = np.frombuffer(base64.b64decode(first["values"]["data"]), "<f4").reshape(-1, 2)
    assert np.allclose(data, values, equal_nan=True)
    assert (first["name"], first["about"]["noise_floor"]) == ("partition_shap", floor)
    assert [one["name"] for one in others][-1] == "keep_one"
    assert found["deep_zoom"] == {"tile": 240, "levels": 13}
    assert (found["mpp"], found["problems"]) == ([0.499, 0.499], [])
    assert found["contract"]["tile"]["size_px"] == 256
    listed = json.loads(get(app, "/api/slides").body)
    assert [row["slide_id"] for row in listed] == [ID]
    assert sum(listed[0]["scores"].values()) == pytest.approx(1, abs=1e-5)


def test_every_answer_forbids_foreign_scripts(get: Get, app: Starlette) -> None:
    for path in ("/", "/page/main.js", "/api/slides", f"/slides/{ID}/7/0_0.jpeg", "/nothing"):
        headers = get(app, path).headers
        assert headers["content-security-policy"].startswith("default-src 'none'; script-src 'self';")
        assert headers["x-content-type-options"] == "nosniff"


def test_only_what_the_folders_hold_can_be_named(get: Get, app: Starlette, out: Path, tmp_path: Path) -> None:
    for path in (
        "/page/../app.py",
        "/page/%2e%2e/app.py",
        "/api/slides/..",
        "/slides/../../etc/passwd",
        "/slides/nobody/0/0_0.jpeg",
        f"/slides/{ID}/maps/1_2.png",
        f"/slides/{ID}/99/0_0.jpeg",
    ):
        assert get(app, path).status == 404, path
    outside = tmp_path / "outside.h5"
    shutil.copy(out / f"{ID}.h5", outside)
    (out / "other.h5").symlink_to(outside)
    (out / f"{ID}-x-tile-1-2.png").symlink_to(outside)
    linked = create_app(Library((out,)))
    assert [row["slide_id"] for row in json.loads(get(linked, "/api/slides").body)] == [ID]
    assert get(linked, f"/slides/{ID}/maps/1_2.png").status == 404


def test_another_name_for_this_machine_is_refused(get: Get, app: Starlette) -> None:
    assert get(app, "/api/slides", host="evil.example:8420").status == 403
    assert get(app, "/api/slides", host="localhost:8420").status == 200


def test_a_token_is_needed_where_one_is_set(get: Get, explained: Path) -> None:
    app = create_app(Library((explained,)), token="secret")
    assert get(app, "/").status == 403
    assert get(app, "/", query="token=wrong").status == 403
    first = get(app, "/", query="token=secret", host="viewer.example")
    assert first.status == 200
    cookie = first.headers["set-cookie"]
    assert "HttpOnly" in cookie
    assert get(app, "/api/slides", cookie=cookie.split(";")[0], host="viewer.example").status == 200


def test_a_broken_file_is_a_message_and_a_line_in_the_log(
    get: Get, out: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (out / f"{ID}.h5").write_bytes(b"no HDF5")
    found = slide(get, out)
    assert "HDF5" in found["problems"][0]
    assert (found["tiles"], found["maps"], found["deep_zoom"]["tile"]) == (None, [], 240)
    assert "HDF5" in caplog.text
    (listed,) = json.loads(get(create_app(Library((out,))), "/api/slides").body)
    assert "HDF5" in listed["warnings"][0]


def test_a_missing_slide_leaves_the_map_and_says_where_to_look(get: Get, out: Path, real_slide: Path) -> None:
    record = read_record(out, ID)
    assert record
    write_record(out, replace(record, path="/nowhere/CMU-1-Small-Region.svs"))
    found = slide(get, out)
    assert "--wsi-dir" in found["problems"][0]
    assert found["deep_zoom"] is None
    assert found["dimensions"] == [2220, 2967]
    assert found["maps"]
    assert slide(get, out, wsi_dir=real_slide.parent)["problems"] == []


def test_another_slide_of_the_same_name_gets_no_map(get: Get, out: Path, slides: Path) -> None:
    found = slide(get, out, slide=slides / "a.tif")
    assert "another file" in found["problems"][0]
    assert found["maps"] == []


def test_a_failed_slide_says_why(get: Get, out: Path) -> None:
    record = read_record(out, ID)
    assert record
    failed = replace(record, slide_id="lost", status="failed", reason="cut off: copy it again")
    write_record(out, failed)
    rows = json.loads(get(create_app(Library((out,))), "/api/slides").body)
    assert [(row["slide_id"], row["status"]) for row in rows] == [(ID, "ok"), ("lost", "failed")]
    assert rows[1]["reason"] == "cut off: copy it again"


def test_the_command_names_a_remedy(run_client: Any, tmp_path: Path, explained: Path) -> None:
    assert "no such folder" in run_client("view", tmp_path / "nothing").err
    done = run_client("view", explained, "--host", "192.0.2.1")
    assert (done.code, done.err.count("\n")) == (1, 1)
    assert "choose another --port" in done.err
