"""The viewer's server: what it shows, what it refuses, and how it says what is wrong."""

from __future__ import annotations

import base64
import json
import shutil
import socket
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from starlette.applications import Starlette

from client.outputs.file_keys import FileKeys
from client.outputs.records import read_record, write_record
from client.scoring.result_key import SlideContent
from client.slides.address import slide_path
from client.slides.fingerprint import file_fingerprint, slide_sha256
from client.slides.mirror import CACHE
from client.slides.slide import open_slide
from client.triton.endpoint import Endpoint
from client.viewer.app import create_app
from client.viewer.ask import Asker
from client.viewer.deepzoom import encode_jpeg
from client.viewer.library import Library
from tests.client.viewer.conftest import send
from tests.support.web import serve_files

ID = "CMU-1-Small-Region"


@pytest.fixture
def app(explained: Path) -> Starlette:
    return create_app(Library((explained,)))


@pytest.fixture
def out(explained: Path, tmp_path: Path) -> Path:
    """A copy of the results, to be changed."""
    return Path(shutil.copytree(explained, tmp_path / "out"))


def slide(folder: Path, key: str = ID, **options: Any) -> Any:
    """What the server says of a slide."""
    return json.loads(send(create_app(Library((folder,), **options)), f"/api/slides/{key}").body)


def test_a_slide_comes_with_tiles_maps_trust_and_evidence(app: Starlette, explained: Path) -> None:
    found = json.loads(send(app, f"/api/slides/{ID}").body)
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
    listed = json.loads(send(app, "/api/slides").body)
    assert [row["slide_id"] for row in listed] == [ID]
    assert sum(listed[0]["scores"].values()) == pytest.approx(1, abs=1e-5)


def test_every_answer_forbids_foreign_scripts(app: Starlette) -> None:
    for path in ("/", "/page/main.js", "/api/slides", f"/slides/{ID}_files/7/0_0.jpeg", "/nothing"):
        headers = send(app, path).headers
        assert headers["content-security-policy"].startswith("default-src 'none'; script-src 'self';")
        assert headers["x-content-type-options"] == "nosniff"


def test_only_what_the_folders_hold_can_be_named(app: Starlette, out: Path, tmp_path: Path) -> None:
    for path in (
        "/page/../app.py",
        "/page/%2e%2e/app.py",
        "/api/slides/..",
        "/slides/../../etc/passwd",
        "/slides/nobody_files/0/0_0.jpeg",
        f"/slides/{ID}/maps/1_2.png",
        f"/slides/{ID}_files/99/0_0.jpeg",
    ):
        assert send(app, path).status == 404, path
    outside = tmp_path / "outside.h5"
    shutil.copy(out / f"{ID}.h5", outside)
    (out / "other.h5").symlink_to(outside)
    (out / f"{ID}-x-tile-1-2.png").symlink_to(outside)
    linked = create_app(Library((out,)))
    assert [row["slide_id"] for row in json.loads(send(linked, "/api/slides").body)] == [ID]
    assert send(linked, f"/slides/{ID}/maps/1_2.png").status == 404


def test_another_name_for_this_machine_is_refused(app: Starlette) -> None:
    assert send(app, "/api/slides", host="evil.example:8420").status == 403
    assert send(app, "/api/slides", host="localhost:8420").status == 200


def test_a_token_is_needed_where_one_is_set(explained: Path) -> None:
    app = create_app(Library((explained,)), token="secret")
    assert send(app, "/").status == 403
    assert send(app, "/", query="token=wrong").status == 403
    first = send(app, "/", query="token=secret", host="viewer.example")
    assert first.status == 200
    cookie = first.headers["set-cookie"]
    assert "HttpOnly" in cookie
    assert send(app, "/api/slides", cookie=cookie.split(";")[0], host="viewer.example").status == 200


def test_a_broken_file_is_a_message_and_a_line_in_the_log(
    out: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (out / f"{ID}.h5").write_bytes(b"no HDF5")
    found = slide(out)
    assert "HDF5" in found["problems"][0]
    assert (found["tiles"], found["maps"], found["deep_zoom"]["tile"]) == (None, [], 240)
    assert "HDF5" in caplog.text
    (listed,) = json.loads(send(create_app(Library((out,))), "/api/slides").body)
    assert "HDF5" in listed["warnings"][0]


def test_a_missing_slide_leaves_the_map_and_says_where_to_look(out: Path, real_slide: Path) -> None:
    record = read_record(out, ID)
    assert record
    write_record(out, replace(record, path="/nowhere/CMU-1-Small-Region.svs"))
    found = slide(out)
    assert "--wsi-dir" in found["problems"][0]
    assert found["deep_zoom"] is None
    assert found["dimensions"] == [2220, 2967]
    assert found["maps"]
    assert slide(out, wsi_dir=real_slide.parent)["problems"] == []


def test_a_relative_path_is_found_from_above_the_results(out: Path, real_slide: Path) -> None:
    record = read_record(out, ID)
    assert record
    slides = out.parent / "slides"
    slides.mkdir()
    copied = Path(shutil.copy(real_slide, slides / real_slide.name))
    write_record(out, replace(record, path=f"slides/{real_slide.name}"))
    assert slide(out)["problems"] == []
    with copied.open("ab") as file:
        file.write(b"changed")
    found = slide(out)
    assert "bytes when it was scored" in found["problems"][0].replace(str(real_slide.stat().st_size), "bytes")
    assert found["maps"] == []


def test_another_slide_of_the_same_name_gets_no_map(out: Path, slides: Path) -> None:
    found = slide(out, slide=slides / "a.tif")
    assert "another file" in found["problems"][0]
    assert found["maps"] == []


def test_a_slide_on_a_server_is_shown(out: Path, real_slide: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CACHE, str(out.parent / "cache"))
    record = read_record(out, ID)
    assert record
    with serve_files({real_slide.name: real_slide.read_bytes()}) as files:
        address = f"{files.address}/{real_slide.name}"
        write_record(out, replace(record, path=address))
        content = SlideContent(slide_sha256(slide_path(address)), file_fingerprint(slide_path(address)))
        with FileKeys(out, ID).writing({}, content):
            pass
        found = slide(out)
        assert found["problems"] == []
        assert found["maps"]
        assert found["deep_zoom"] == {"tile": 256, "levels": 13}
        tile = send(create_app(Library((out,))), f"/slides/{ID}_files/12/3_4.jpeg").body
        with open_slide(real_slide) as same:
            assert tile == encode_jpeg(same.read(0, (3 * 256, 4 * 256), (256, 256)))
        lost = slide(out, slide=slide_path(f"{files.address}/lost.svs"))
        assert "lost.svs: no such file on the server" in lost["problems"][0]
        files.etag = '"second"'
        found = slide(out)
        assert "its server had another one when it was scored: another file" in found["problems"][0]
        assert found["maps"] == []


def test_a_failed_slide_says_why(out: Path) -> None:
    record = read_record(out, ID)
    assert record
    failed = replace(record, slide_id="lost", status="failed", reason="cut off: copy it again")
    write_record(out, failed)
    rows = json.loads(send(create_app(Library((out,))), "/api/slides").body)
    assert [(row["slide_id"], row["status"]) for row in rows] == [(ID, "ok"), ("lost", "failed")]
    assert rows[1]["reason"] == "cut off: copy it again"


@pytest.mark.parametrize("change", [{"mpp": "x"}, {"notes": 3}, {"slide_id": "../x"}, {"slide_id": 1}])
def test_a_record_that_makes_no_sense_is_left_out(out: Path, change: dict[str, Any]) -> None:
    stored = json.loads((out / "records" / f"{ID}.json").read_text())
    (out / "records" / "odd.json").write_text(json.dumps({**stored, **change}))
    rows = json.loads(send(create_app(Library((out,))), "/api/slides").body)
    assert [row["slide_id"] for row in rows] == [ID]


def test_the_command_names_a_remedy(run_client: Any, tmp_path: Path, explained: Path) -> None:
    assert "no such folder" in run_client("view", tmp_path / "nothing").err
    done = run_client("view", explained, "--host", "192.0.2.1")
    assert (done.code, done.err.count("\n")) == (1, 1)
    assert "choose another --port" in done.err


def test_neighbours_are_those_of_the_largest_cosine(app: Starlette, explained: Path, coarse: Path) -> None:
    found = json.loads(send(app, f"/api/slides/{ID}/neighbours/7").body)
    with h5py.File(explained / f"{ID}.h5") as file:
        unit = file["features"][:] / np.linalg.norm(file["features"][:], axis=1, keepdims=True)
        coords = file["coords"][:]
    alike = unit @ unit[7]
    best = np.argsort(-alike)[1:9]
    assert [near["row"] for near in found] == best.tolist()
    assert [near["corner"] for near in found] == coords[best].tolist()
    assert [near["similarity"] for near in found] == pytest.approx(alike[best], abs=1e-5)
    both = create_app(Library((explained, coarse)))
    everywhere = json.loads(send(both, f"/api/slides/{ID}/neighbours/7", query="everywhere=1").body)
    assert {near["slide"]["key"] for near in everywhere} <= {ID, "coarse"}
    assert min(near["similarity"] for near in everywhere) >= min(alike[best]) - 1e-6
    assert b"choose another" in send(app, f"/api/slides/{ID}/neighbours/999").body


def test_a_question_is_taken_back_when_the_page_goes_away(explained: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # it takes connections and never answers
        port = silent.getsockname()[1]
        app = create_app(Library((explained,)), Asker(Endpoint(f"127.0.0.1:{port}", timeout=250)))
        began = time.monotonic()
        gone = send(
            app,
            f"/api/slides/{ID}/ask",
            method="POST",
            body=b'{"tiles": [1, 2]}',
            content_type="application/json",
            gone_after=0.5,
        )
        assert time.monotonic() - began < 60
    assert b"cancelled" in gone.body


def test_questions_without_a_server_or_sense_are_one_line(app: Starlette, explained: Path) -> None:
    path, json_type = f"/api/slides/{ID}/ask", "application/json"
    assert send(app, path, method="POST", body=b"{}").status == 415
    assert send(app, path, method="POST", body=b"{", content_type=json_type).status == 400
    assert b"no server was named" in send(app, path, method="POST", body=b"{}", content_type=json_type).body
    away = create_app(Library((explained,)), Asker(Endpoint("127.0.0.1:9")))
    assert "127.0.0.1:9" in json.loads(send(away, "/api/server").body)["error"]
    for body in (b"[]", b"{}", b'{"area": [[0, 0]]}', b'{"tiles": "x"}', b'{"area": [[0,0],[1,0],[1,1]]}'):
        assert b": draw" in send(away, path, method="POST", body=body, content_type=json_type).body
