"""Slides of a real DICOMweb server, Orthanc, with a login: OpenSlide's pixels of the same files on disk."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.request import Request, urlopen

import imagecodecs
import numpy as np
import pytest
from numpy.typing import NDArray

from benchmarks.orthanc import LOGIN, MISSING, Orthanc, serve_orthanc
from client.errors import ClientError, SlideError, SlideServerError
from client.slides import dicomweb
from client.slides.address import TOKENS, slide_path
from client.slides.fingerprint import slide_sha256
from client.slides.slide import open_slide
from client.viewer.deepzoom import DeepZoom
from server.ports import free_port
from tests.support.dicom import split_instance, write_segmentation, write_series


@pytest.fixture(scope="module")
def orthanc(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Orthanc]:
    """A server that asks for a login."""
    with serve_orthanc(tmp_path_factory.mktemp("orthanc")) as server:
        if server is None:
            pytest.skip(MISSING)
        yield server


@pytest.fixture(scope="module")
def series(
    orthanc: Orthanc, picture: NDArray[np.uint8], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[str, Path]]:
    """Address and a file of each series that the server holds."""
    folder = tmp_path_factory.mktemp("series")
    pixels = picture[700:1700, 300:1600]
    for stem in ("jpeg", "label", "lossless", "mask", "parts", "sparse", "lost"):
        (folder / stem).mkdir()
    write_series(folder / "jpeg", "jpeg", pixels)
    write_series(folder / "lossless", "lossless", pixels, lossless=True)
    for stem in ("parts", "sparse", "lost"):
        level0 = write_series(folder / stem, stem, pixels)[0]
        parts = split_instance(level0, 3, sparse=stem == "sparse")
        if stem == "lost":
            parts[1].unlink()
    write_series(folder / "label", "label", pixels[:300, :300], levels=(1,), flavour="LABEL")
    write_segmentation(folder / "mask" / "mask.dcm", "other")
    return {
        place.name: (orthanc.store(sorted(place.iterdir()))[0], min(place.iterdir()))
        for place in folder.iterdir()
    }


@pytest.fixture(autouse=True)
def tokens(orthanc: Orthanc, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TOKENS, orthanc.tokens[TOKENS])


@pytest.mark.parametrize("mpp", [0.5, 2.0])
@pytest.mark.parametrize("kind", ["jpeg", "lossless", "parts", "sparse"])
def test_all_tiles_are_openslides(
    kind: str, mpp: float, series: dict[str, tuple[str, Path]], reading: SimpleNamespace
) -> None:
    address, path = series[kind]
    plan, expected = reading.plan(slide_path(address), mpp=mpp), reading.plan(path, mpp=mpp)
    assert plan.fingerprint == expected.fingerprint
    assert plan.level == (mpp == 2.0)
    pixels, valid, reader = reading.collect(plan, workers=4)
    wanted, _, local = reading.collect(expected)
    assert (reader, local) == ({"wsidicom"}, {"openslide"})
    np.testing.assert_array_equal(pixels, wanted)
    assert valid.all()


def test_a_series_is_the_slide_that_openslide_opens(series: dict[str, tuple[str, Path]]) -> None:
    address, path = series["jpeg"]
    with open_slide(slide_path(address)) as slide, open_slide(path) as same:
        assert slide.slide_id == address.rpartition("/")[2]
        for name in (
            "dimensions",
            "level_dimensions",
            "level_downsamples",
            "mpp",
            "bounds",
            "vendor",
            "notes",
        ):
            assert getattr(slide, name) == getattr(same, name), name
        for position in ((-50, -30), (1200, 900), (5000, 5000)):  # white beyond the edge
            part = slide.read(0, position, (200, 150))
            np.testing.assert_array_equal(part, same.read(0, position, (200, 150)))
        np.testing.assert_array_equal(slide.overview(8).pixels, same.overview(8).pixels)
        shown, expected = DeepZoom(slide), DeepZoom(same)  # what `client view` shows
        assert all(shown.read(*place) == expected.read(*place) for place in expected.places())


def test_the_identity_of_a_series_is_its_instances_on_any_server(
    series: dict[str, tuple[str, Path]], orthanc: Orthanc, monkeypatch: pytest.MonkeyPatch
) -> None:
    address, host = series["jpeg"][0], orthanc.host
    other = host.replace("127.0.0.1", "localhost")
    monkeypatch.setenv(TOKENS, f"{host}={':'.join(LOGIN)} {other}={':'.join(LOGIN)}")
    digest = slide_sha256(slide_path(address))
    assert digest == slide_sha256(slide_path(address.replace(host, other)))
    assert digest != slide_sha256(slide_path(series["lossless"][0]))


def _refused(address: str) -> str:
    with pytest.raises(ClientError) as caught:
        open_slide(slide_path(address))
    message = str(caught.value)
    assert message.startswith(f"{address}: ")
    assert "\n" not in message
    assert "word" not in message
    return message.removeprefix(f"{address}: ")


def test_what_cannot_be_read_is_one_line(
    series: dict[str, tuple[str, Path]], orthanc: Orthanc, monkeypatch: pytest.MonkeyPatch
) -> None:
    address, host = series["jpeg"][0], orthanc.host
    for kind in ("label", "mask"):
        assert _refused(series[kind][0]).startswith("has no whole-slide image: give a series of one")
    assert "parts of a concatenation are missing" in _refused(series["lost"][0])
    assert _refused(f"{address}7").startswith("has no whole-slide image")
    assert _refused(address.replace("dicom-web", "elsewhere")).startswith("the server answers 404: check")
    monkeypatch.setenv(TOKENS, f"{host}=reader:sword")
    assert _refused(address) == f"the server refuses access (401): check what {TOKENS} holds for {host}"
    monkeypatch.setenv(TOKENS, f"elsewhere={':'.join(LOGIN)}")
    assert _refused(address) == (
        f"the server refuses access (401): set {TOKENS}={host}=TOKEN, or {host}=USER:PASSWORD"
    )
    monkeypatch.delenv(TOKENS)
    away = address.replace(host, f"127.0.0.1:{free_port('127.0.0.1')}")
    assert _refused(away).startswith("cannot be read (ConnectionError): check the address and the network")


@contextmanager
def tampered(orthanc: Orthanc, change: Callable[[bytes], bytes], *, busy: int = 0) -> Iterator[str]:
    """The host of a server that hands on the answers of `orthanc`, content and its type changed.

    It is busy at the first `busy` requests.
    """
    refusals = iter(range(busy))

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if next(refusals, None) is not None:
                self.send_error(503)
                return
            asked = {name: self.headers[name] for name in ("Accept", "Authorization")}
            with urlopen(Request(f"http://{orthanc.host}{self.path}", headers=asked), timeout=30) as answer:
                data = change(answer.read())
            self.send_response(200)
            self.send_header("Content-Type", change(answer.headers["Content-Type"].encode()).decode())
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *about: object) -> None:
            """Nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


LARGE = {
    "jpeg": (re.compile(rb"(?s)(\xff\xc0\x00\x11\x08)...."), b"\\g<1>\xff\xf0\xff\xf0"),
    "lossless": (re.compile(rb"(?s)(\xff\x4f\xff\x51....)........"), b"\\g<1>\0\1\0\0\0\1\0\0"),
}


@pytest.mark.parametrize("kind", LARGE)
def test_a_frame_that_claims_much_is_not_decoded(
    kind: str, series: dict[str, tuple[str, Path]], orthanc: Orthanc, monkeypatch: pytest.MonkeyPatch
) -> None:
    pattern, larger = LARGE[kind]
    with tampered(orthanc, lambda data: pattern.sub(larger, data)) as host:
        monkeypatch.setenv(TOKENS, f"{host}={':'.join(LOGIN)}")
        path = slide_path(series[kind][0].replace(orthanc.host, host))
        said = rf"^{path}: cannot decode level 0 at \(0, 0\) \(a frame claims 65\d+x65\d+ px\): copy"
        with open_slide(path) as slide, pytest.raises(SlideError, match=said):
            slide.read(0, (0, 0), (50, 50))


@pytest.mark.parametrize(
    ("tag", "value", "said"),
    [
        ("00480006", 4_000_000_000, "its header claims 4000000000x1000 px"),
        ("00280010", 2_000_000, "its tiles claim 256x2000000 px"),
        ("00280011", 0, "cannot be read"),
        ("00480006", "x", "cannot be read"),
    ],
)
def test_a_header_that_claims_much_is_refused(
    tag: str,
    value: int | str,
    said: str,
    series: dict[str, tuple[str, Path]],
    orthanc: Orthanc,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def change(data: bytes) -> bytes:
        if not data.startswith(b"["):
            return data
        instances = json.loads(data)
        for instance in instances:
            if tag in instance:
                instance[tag]["Value"] = [value]
        return json.dumps(instances).encode()

    with tampered(orthanc, change) as host:
        monkeypatch.setenv(TOKENS, f"{host}={':'.join(LOGIN)}")
        assert _refused(series["jpeg"][0].replace(orthanc.host, host)).startswith(said)


def test_jpeg_2000_may_come_in_its_files_boxes(
    series: dict[str, tuple[str, Path]], orthanc: Orthanc, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = imagecodecs.jpeg2k_encode(np.zeros((256, 256, 3), np.uint8), reversible=True, codecformat="jp2")
    stream = b"\xff\x4f\xff\x51"
    boxes = file[: file.index(stream) - 8] + b"\0\0\0\0jp2c"  # a length of 0: to the end
    with tampered(orthanc, lambda data: data.replace(stream, boxes + stream)) as host:
        monkeypatch.setenv(TOKENS, f"{host}={':'.join(LOGIN)}")
        address, path = series["lossless"]
        with open_slide(slide_path(address.replace(orthanc.host, host))) as slide, open_slide(path) as same:
            part = slide.read(0, (200, 300), (500, 400))
            np.testing.assert_array_equal(part, same.read(0, (200, 300), (500, 400)))


def test_frames_whose_size_cannot_be_checked_are_refused(
    series: dict[str, tuple[str, Path]], orthanc: Orthanc, monkeypatch: pytest.MonkeyPatch
) -> None:
    named = b"transfer-syntax=1.2.840.10008.1.2.4."
    with tampered(orthanc, lambda data: data.replace(named + b"50", named + b"110")) as host:
        monkeypatch.setenv(TOKENS, f"{host}={':'.join(LOGIN)}")
        said = _refused(series["jpeg"][0].replace(orthanc.host, host))
    assert said == "its frames are in JPEG XL: download and convert it"


def test_an_answer_that_does_not_end_is_not_read_to_its_end(
    series: dict[str, tuple[str, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    dicomweb.forget_series()
    with open_slide(slide_path(series["jpeg"][0])) as slide:
        monkeypatch.setattr(dicomweb, "_LARGEST_ANSWER", 1000)
        with pytest.raises(SlideServerError, match="the server sends more than 0 MiB at once: download"):
            slide.read(0, (0, 0), (50, 50))


def test_an_answer_that_is_too_long_or_too_slow_is_not_asked_for_again(
    series: dict[str, tuple[str, Path]], orthanc: Orthanc, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bytes] = []

    def count(data: bytes) -> bytes:
        asked.append(data)
        return data

    with tampered(orthanc, count) as host:
        monkeypatch.setenv(TOKENS, f"{host}={':'.join(LOGIN)}")
        address = series["jpeg"][0].replace(orthanc.host, host)
        with monkeypatch.context() as bounds:
            bounds.setattr(dicomweb, "_LARGEST_ANSWER", 100)
            assert _refused(address).startswith("the server sends more than 0 MiB at once")
        with monkeypatch.context() as bounds:
            bounds.setattr(dicomweb, "_LONGEST_S", -1)
            assert _refused(address).startswith("cannot be read (not all of an answer in -1 seconds)")
    assert len(asked) == 6  # three answers, and the type of each


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ((rb"^multipart/related.*", b"text/html"), "sends a page of text, as for a login, in place of DICOM"),
        ((rb"(?s)^--.*", b""), "the server leaves out 1 of 1 frames: try again"),
    ],
)
def test_a_server_that_stops_to_serve_is_no_damaged_tile(
    change: tuple[bytes, bytes],
    said: str,
    series: dict[str, tuple[str, Path]],
    orthanc: Orthanc,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As where a login expires."""
    begun = threading.Event()

    def stop(data: bytes) -> bytes:
        return re.sub(*change, data) if begun.is_set() else data

    with tampered(orthanc, stop) as host:
        monkeypatch.setenv(TOKENS, f"{host}={':'.join(LOGIN)}")
        with open_slide(slide_path(series["jpeg"][0].replace(orthanc.host, host))) as slide:
            begun.set()
            with pytest.raises(SlideServerError, match=said):
                slide.read(0, (0, 0), (50, 50))


def test_a_server_that_is_busy_for_a_moment_is_asked_again(
    series: dict[str, tuple[str, Path]], orthanc: Orthanc, monkeypatch: pytest.MonkeyPatch
) -> None:
    with tampered(orthanc, lambda data: data, busy=2) as host:
        monkeypatch.setenv(TOKENS, f"{host}={':'.join(LOGIN)}")
        with open_slide(slide_path(series["jpeg"][0].replace(orthanc.host, host))) as slide:
            assert slide.dimensions == (1300, 1000)


def test_commands_take_a_series(series: dict[str, tuple[str, Path]], run_client: Any, tmp_path: Path) -> None:
    (address, path), manifest = series["jpeg"], tmp_path / "slides.csv"
    manifest.write_text(f"slide_id,path\nserved,{address}\nlocal,{path}\n")
    done = run_client("tissue", manifest, "--out", tmp_path)
    assert done.code == 0, done.err
    rows = [line.split(",") for line in (tmp_path / "tissue.csv").read_text().splitlines()]
    assert rows[1][1] == address
    assert rows[1][4:] == rows[2][4:]
    masks = [(tmp_path / "masks" / f"{name}.png").read_bytes() for name in ("served", "local")]
    assert masks[0] == masks[1]
