"""Slides at https:// and s3:// addresses: OpenSlide's pixels of the file, of which only parts are fetched."""

from __future__ import annotations

import pickle
import ssl
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tifffile
import trustme
from numpy.typing import NDArray

from client.batch.manifest import read_work_list
from client.errors import ClientError, SlideServerError
from client.reading.stream import read_tiles
from client.scoring.score import SlideSource
from client.slides.address import TOKENS, RemotePath, slide_path
from client.slides.fingerprint import file_fingerprint, slide_sha256
from client.slides.mirror import CACHE, CACHE_GB, open_mirror
from client.slides.slide import open_slide
from tests.support.pyramid import shrink, write_pyramid
from tests.support.web import Files, serve_files


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(CACHE, str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def server(cache: Path, real_slide: Path) -> Iterator[Files]:
    """Serves the real slide as /S.svs."""
    with serve_files({"S.svs": real_slide.read_bytes()}) as files:
        yield files


def _sparse(path: Path, picture: NDArray[np.uint8]) -> None:
    """Some tiles of both levels are left out: OpenSlide shows the finer level in their place."""
    write_pyramid(path, picture[:2048, :2048], levels=(1, 4), description="Aperio made|AppMag = 20|MPP = 0.5")
    with tifffile.TiffFile(path, mode="r+") as file:
        for page in (page.aspage() for page in file.pages):
            for name in ("TileOffsets", "TileByteCounts"):
                values = list(page.tags[name].value)
                page.tags[name].overwrite([*values[:-1], 0])


def _ome(path: Path, picture: NDArray[np.uint8]) -> None:
    """The smaller level lies in a SubIFD."""
    with tifffile.TiffWriter(path, ome=True) as file:
        for factor, metadata in ((1, {"PhysicalSizeX": 0.5, "PhysicalSizeY": 0.5}), (4, None)):
            file.write(
                shrink(picture[:2048, :2048], factor),
                subifds=int(factor == 1),
                subfiletype=int(factor > 1),
                tile=(256, 256),
                photometric="rgb",
                compression="jpeg",
                metadata=metadata,
            )


@pytest.fixture(params=["svs", "pyramid", "deflate", "sparse", "leica", "ome"])
def local(
    request: pytest.FixtureRequest,
    real_slide: Path,
    leica_slide: Path,
    picture: NDArray[np.uint8],
    reading: SimpleNamespace,
    tmp_path: Path,
) -> Path:
    path = tmp_path / "slide.tif"
    if request.param == "pyramid":
        write_pyramid(path, picture[:2048, :2048], levels=(1, 2, 4))
    elif request.param == "deflate":
        reading.write_deflate(path, picture[:1024, :1024])
    elif request.param == "sparse":
        _sparse(path, picture)
    elif request.param == "ome":
        _ome(path, picture)
    else:
        return real_slide if request.param == "svs" else leica_slide
    return path


@pytest.mark.parametrize("mpp", [0.5, 2.0])
def test_all_tiles_are_openslides(local: Path, mpp: float, cache: Path, reading: SimpleNamespace) -> None:
    with serve_files({local.name: local.read_bytes()}) as files:
        remote = slide_path(f"{files.address}/{local.name}")
        plan, expected = reading.plan(remote, mpp=mpp), reading.plan(local, mpp=mpp)
        assert plan.fingerprint == expected.fingerprint
        assert len(plan) > 0
        pixels, valid, _ = reading.collect(plan, workers=4)
        wanted, wanted_valid, _ = reading.collect(expected)
        np.testing.assert_array_equal(pixels, wanted)
        np.testing.assert_array_equal(valid, wanted_valid)
        with open_slide(remote) as slide, open_slide(local) as same:
            assert slide.slide_id == local.stem
            np.testing.assert_array_equal(slide.overview(16).pixels, same.overview(16).pixels)
            np.testing.assert_array_equal(slide.thumbnail(300), same.thumbnail(300))


def test_only_what_is_looked_at_is_fetched_and_once(
    cache: Path, picture: NDArray[np.uint8], tmp_path: Path
) -> None:
    path = write_pyramid(tmp_path / "large.tif", picture[:512, :512], size=(10_240, 10_240), levels=(1, 16))
    with serve_files({path.name: path.read_bytes()}) as files:
        for _ in range(2):  # the second time from the cache
            with open_slide(slide_path(f"{files.address}/{path.name}")) as slide, open_slide(path) as same:
                for position in ((3000, 4000), (3100, 4000)):
                    part = slide.read(0, position, (224, 224))
                    np.testing.assert_array_equal(part, same.read(0, position, (224, 224)))
            assert 0 < files.sent < path.stat().st_size / 10
        assert sum(bool(headers.get("range")) for _, _, headers in files.requests) < 20


def test_a_name_of_an_address_is_a_path_that_keeps_its_slashes(tmp_path: Path) -> None:
    path = slide_path("s3://bucket/a b/S.1.svs", tmp_path)
    assert isinstance(path, RemotePath)
    assert str(path) == f"{path}" == str(path.absolute()) == "s3://bucket/a b/S.1.svs"
    assert (path.name, path.stem, path.suffix) == ("S.1.svs", "S.1", ".svs")
    assert (path.host, path.key, path.exists()) == ("bucket", "a b/S.1.svs", False)
    assert slide_path(Path("s3://bucket/a b/S.1.svs")) == path == pickle.loads(pickle.dumps(path))
    assert slide_path("S.svs", tmp_path) == tmp_path / "S.svs"
    keys = {"s3://bucket/a%20b/S#1?.svs": "a%20b/S#1?.svs", "HTTPS://host/a%20b/S%231.svs": "a b/S#1.svs"}
    for address, key in keys.items():
        named = slide_path(address)
        assert isinstance(named, RemotePath)
        assert (str(named), named.key) == (address, key)
    series = slide_path("https://pacs.example.org/dicom-web/studies/1.2.3/series/1.2.40")
    assert isinstance(series, RemotePath)
    assert (SlideSource(series).slide_id, series.series) == (
        "1.2.40",
        ("https://pacs.example.org/dicom-web", "1.2.3", "1.2.40"),
    )


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("file:///etc/passwd", "file:// is not read: give a file's path"),
        ("HTTP://pacs.example.org/S.svs", "http:// would show slide and login on the network"),
        ("ftp://host/S.svs", "ftp:// is not read"),
        ("https://host/S.svs?token=hush", "a query or login in an address shows in outputs"),
        ("https://me:hush@host/S.svs", "a query or login in an address shows in outputs"),
        ("http://pacs.example.org/S.svs", "http:// would show slide and login on the network"),
        ("gs://host/S.svs?token=hush", "a query or login in an address shows in outputs"),
        ("s3://key:hush@bucket/S.svs", "a query or login in an address shows in outputs"),
        ("https://host/S#1.svs", "and # of a file's name: %3F and %23"),
        ("https://host", "names no file on a server"),
        ("s3://bucket", "names no file on a server"),
        ("https://ho st/S.svs", "names no file on a server"),
        ("https://host/a/%2e%2e/S.svs", "names no file on a server"),
        ("https://host/S%0a.svs", "names no file on a server"),
        ("https://me:hush@[::1/S.svs", "an address of https:// that names no server"),
        ("https://host:99999/S.svs", "an address of https:// that names no server"),
    ],
)
def test_other_addresses_are_refused(address: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(ClientError, match=said) as caught:
        slide_path(address)
    assert "hush" not in str(caught.value)
    manifest = tmp_path / "slides.csv"
    manifest.write_text(f"path\n{address}\nhttps://host/good.svs\n")
    work = read_work_list(manifest)
    assert [(str(slide.path), slide.slide_id) for slide in work.slides] == [("https://host/good.svs", "good")]
    assert said in work.bad[0].reason
    assert "hush" not in repr(work.bad)


def _locked(files: Files) -> None:
    files.authorization = "Bearer right"


def _replaced(files: Files) -> None:
    files.content["/S.svs"] = b"slide_id,path\na,a.svs\n" * 10


def _dicom(files: Files) -> None:
    files.content["/S.svs"] = bytes(128) + b"DICM" + bytes(500)


def _cut(files: Files) -> None:
    files.content["/S.svs"] = files.content["/S.svs"][:900_000]


def _gone(files: Files) -> None:
    files.content.clear()


def _unversioned(files: Files) -> None:
    files.etag = ""


def _without_ranges(files: Files) -> None:
    files.ranges = False


def _failing(files: Files) -> None:
    files.failure = b"<Code>Odd</Code><Token-0>hush</Token-0>"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_locked, r"the server refuses access \(401\): check what GIGAPATH_SLIDE_TOKENS holds for localhost"),
        (_gone, "no such file on the server: check the address"),
        (_replaced, "of a kind that is not read from a server, or no slide: download it"),
        (_dicom, "one file of a DICOM series: download its folder, or give a DICOMweb series"),
        (_cut, "cut off|damaged, copy it again"),
        (_unversioned, "sends neither ETag nor Last-Modified"),
        (_without_ranges, "does not send parts of files: download it"),
        (_failing, r"cannot be read \(answer 400\): check the address"),
    ],
)
def test_what_cannot_be_read_is_one_line(
    change: Any, said: str, server: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(TOKENS, f"{server.address.removeprefix('http://')}=hush")
    change(server)
    with pytest.raises(ClientError, match=said) as caught:
        open_slide(slide_path(f"{server.address}/S.svs"))
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(f"{server.address}/S.svs: ")
    assert "hush" not in str(caught.value)


@pytest.mark.parametrize(
    ("address", "library", "extra"),
    [
        ("s3://bucket/S.svs", "mirror", "remote"),
        ("https://host/studies/1.2/series/1.3", "dicomweb", "dicomweb"),
    ],
)
def test_a_missing_extra_is_named(
    address: str, library: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, f"client.slides.{library}", None)  # as if its libraries were missing
    monkeypatch.delitem(sys.modules, "client.slides.remote_file", raising=False)
    for use in (slide_sha256, open_slide):
        with pytest.raises(SlideServerError) as caught:
            use(slide_path(address))
        assert str(caught.value) == (
            f"{address}: needs the extra `{extra}`: pip install 'gigapath-triton[{extra}]'"
        )


def test_a_server_that_is_not_there_is_one_line(cache: Path) -> None:
    with pytest.raises(
        SlideServerError, match=r"cannot be read .*: check the address and the network"
    ) as caught:
        slide_sha256(slide_path("http://127.0.0.1:1/S.svs"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("login", "header"), [("tok.en", "Bearer tok.en"), ("me:pass:word", "Basic bWU6cGFzczp3b3Jk")]
)
def test_a_login_goes_to_its_own_server_alone(
    login: str, header: str, server: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = slide_path(f"{server.address}/S.svs")
    monkeypatch.setenv(TOKENS, f"other.example.org={login}")
    slide_sha256(path)
    assert "authorization" not in server.requests[-1][2]
    server.authorization = header
    with pytest.raises(SlideServerError, match=rf"set {TOKENS}=localhost:\d+=TOKEN, or localhost"):
        slide_sha256(path)
    monkeypatch.setenv(TOKENS, f"other.example.org=x {server.address.removeprefix('http://')}={login}")
    shouted = slide_path(f"{server.address}/S.svs".replace("localhost", "LOCALHOST"))
    for known in (path, shouted):  # names of servers have no case
        with open_slide(known) as slide:
            assert slide.dimensions == (2220, 2967)
    assert {headers["authorization"] for *_, headers in server.requests[-3:]} == {header}


def test_https_needs_a_known_authority_and_leads_to_https_alone(
    cache: Path, real_slide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    authority, tls = trustme.CA(), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(tls)
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    slide = {"S.svs": real_slide.read_bytes()}
    with (
        serve_files(slide, tls) as files,
        serve_files(slide, tls) as other,
        serve_files(slide) as plain,
    ):
        host = files.address.removeprefix("https://")
        monkeypatch.setenv(TOKENS, f"{host}=hush")
        with pytest.raises(SlideServerError, match="with a certificate authority of your own SSL_CERT_FILE"):
            slide_sha256(slide_path(f"https://localhost.:{host.partition(':')[2]}/S.svs"))
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
        files.elsewhere = {"/far.svs": f"{other.address}/S.svs", "/plain.svs": f"{plain.address}/S.svs"}
        for name in ("S", "far"):
            with open_slide(slide_path(f"{files.address}/{name}.svs")) as opened:
                assert opened.dimensions == (2220, 2967)
        assert {headers.get("authorization") for *_, headers in files.requests} == {"Bearer hush"}
        assert {headers.get("authorization") for *_, headers in other.requests} == {None}
        with pytest.raises(SlideServerError, match="error following redirect"):
            open_slide(slide_path(f"{files.address}/plain.svs"))
        assert not plain.requests


@pytest.mark.parametrize("etag", ['"{}"', 'W/"{}"'])
def test_a_slide_that_changes_while_it_is_read_fails_and_is_another_slide(
    etag: str, server: Files, reading: SimpleNamespace
) -> None:
    server.etag = etag.format(1)
    path = slide_path(f"{server.address}/S.svs")
    before, files = slide_sha256(path), file_fingerprint(path)
    plan = reading.plan(path)
    batches = read_tiles(plan, workers=1, batch=4)
    next(batches)
    server.etag = etag.format(2)
    with pytest.raises(SlideServerError, match="was replaced while it was read: run again"):
        list(batches)
    assert slide_sha256(path) != before
    assert file_fingerprint(path) != files


def test_a_server_that_is_lost_fails_the_slide_and_no_tile(server: Files, reading: SimpleNamespace) -> None:
    batches = read_tiles(reading.plan(slide_path(f"{server.address}/S.svs")), workers=1, batch=4)
    assert next(batches).valid.all()
    server.content.clear()
    with pytest.raises(SlideServerError, match="no such file on the server"):
        list(batches)


def test_a_version_is_kept_from_the_plan_to_the_last_tile(server: Files, reading: SimpleNamespace) -> None:
    plan = reading.plan(slide_path(f"{server.address}/S.svs"))
    server.etag = '"second"'
    with pytest.raises(SlideServerError, match="was replaced while it was read: run again"):
        reading.collect(plan)


def test_a_slide_is_asked_for_once(server: Files) -> None:
    with open_slide(slide_path(f"{server.address}/S.svs")) as slide:
        slide.overview(16)
    assert [method for method, *_ in server.requests].count("HEAD") == 1


def test_blocks_that_a_crash_left_behind_are_fetched_again(server: Files) -> None:
    path = slide_path(f"{server.address}/S.svs")
    assert isinstance(path, RemotePath)
    mirror = open_mirror(path)
    mirror.fetch_all()
    file = mirror.path
    del mirror
    with file.open("r+b") as written:  # as after a power cut: not all that was written is on the disk
        written.seek(700_000)
        written.write(bytes(200_000))
    mirror, sent = open_mirror(path), server.sent
    mirror.fetch_all()
    assert file.read_bytes() == server.content["/S.svs"]
    assert 200_000 < server.sent - sent < 400_000


def test_the_cache_keeps_its_bound(server: Files, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CACHE_GB, "0.0025")  # a slide is 0.0019 GB
    other = cache / "mine" / "data"  # a folder that is not the cache's alone
    other.parent.mkdir(parents=True)
    other.write_bytes(bytes(3_000_000))
    server.content["/T.svs"] = server.content["/S.svs"]
    first, second = (slide_path(f"{server.address}/{name}.svs") for name in "ST")
    assert isinstance(first, RemotePath)
    assert isinstance(second, RemotePath)
    mirror = open_mirror(first)
    mirror.fetch_all()
    assert (mirror.path.read_bytes(), mirror.path.stat().st_mode & 0o77) == (server.content["/S.svs"], 0)
    with pytest.raises(
        SlideServerError, match=rf"0.0025 GB do not hold what is read at once: set {CACHE_GB}"
    ):
        open_mirror(second).fetch_all()
    old = mirror.path
    del mirror  # nobody reads it any more
    mirror = open_mirror(second)
    mirror.fetch_all()
    assert mirror.path.read_bytes() == server.content["/T.svs"]
    assert not old.exists()
    assert other.exists()
    other.unlink()
    assert sum(path.stat().st_blocks * 512 for path in cache.rglob("*")) < 0.0025e9


def test_slides_that_are_read_at_once_keep_the_bound(
    server: Files, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(CACHE_GB, "0.003")
    server.content["/T.svs"] = server.content["/S.svs"]
    paths = [slide_path(f"{server.address}/{name}.svs") for name in "ST"]
    first, second = (open_mirror(path) for path in paths if isinstance(path, RemotePath))
    first.fetch([0], [1])
    second.fetch_all()
    with pytest.raises(SlideServerError, match="do not hold what is read at once"):
        first.fetch_all()
    assert sum(path.stat().st_blocks * 512 for path in cache.rglob("*")) < 0.003e9


def test_s3_is_read_with_the_credentials_of_the_environment(
    cache: Path, real_slide: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serve_files({"bucket/lab/S.svs": real_slide.read_bytes()}) as files:
        files.authorization = "AWS4-HMAC-SHA256 Credential=key/"
        for name, value in {
            "ENDPOINT_URL": files.address,
            "ALLOW_HTTP": "true",
            "ACCESS_KEY_ID": "key",
            "SECRET_ACCESS_KEY": "secret",
            "REGION": "eu-central-1",
        }.items():
            monkeypatch.setenv(f"AWS_{name}", value)
        with open_slide(slide_path("s3://bucket/lab/S.svs")) as slide, open_slide(real_slide) as same:
            part = slide.read(0, (500, 900), (300, 200))
            np.testing.assert_array_equal(part, same.read(0, (500, 900), (300, 200)))
            files.failure = b"<?xml?>\n<Code>ExpiredToken</Code><Token-0>hush</Token-0>"
            with pytest.raises(SlideServerError, match=r"\(expired token\): set or renew AWS_") as caught:
                slide.read(0, (500, 2500), (300, 200))
            assert "hush" not in str(caught.value)
        with pytest.raises(SlideServerError, match="no such file on the server"):
            open_slide(slide_path("s3://bucket/lab/T.svs"))
        files.elsewhere["/bucket/lab/T.svs"] = ""  # as S3 answers where the region is another
        with pytest.raises(SlideServerError, match="its bucket lies in another region: set AWS_REGION"):
            open_slide(slide_path("s3://bucket/lab/T.svs"))


def test_s3_without_credentials_or_https_says_what_to_set(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serve_files({}) as files:
        monkeypatch.setenv("AWS_METADATA_ENDPOINT", files.address)  # where a virtual machine asks for them
        with pytest.raises(SlideServerError, match=r"\(no credentials found\): .* AWS_SKIP_SIGNATURE=true"):
            open_slide(slide_path("s3://unsigned/S.svs"))
        for endpoint in (files.address, files.address.removeprefix("http://")):
            monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
            with pytest.raises(SlideServerError, match=f"the endpoint {endpoint} is not https://: correct"):
                open_slide(slide_path("s3://unsigned/S.svs"))


def test_commands_take_addresses(
    server: Files, triton_url: str, real_slide: Path, run_client: Any, tmp_path: Path
) -> None:
    address, out = f"{server.address}/S.svs", tmp_path / "out"
    done = run_client("score", address, "--url", triton_url, "--out", out)
    assert done.code == 0, done.err
    again = run_client("score", address, "--url", triton_url, "--out", out)
    assert "was done" in again.out
    checked = run_client("doctor", address, "--url", triton_url, "--out", out)
    assert "slide S: 2220 x 2967 px" in checked.out
    manifest = tmp_path / "slides.csv"
    manifest.write_text(f"slide_id,path\nS,{address}\nlost,{server.address}/lost.svs\n")
    batch = run_client("batch", manifest, "--url", triton_url, "--out", tmp_path / "batch")
    assert batch.code == 1
    status = next((tmp_path / "batch").rglob("status.csv")).read_text()
    assert "lost.svs: no such file on the server" in status
    assert address in status
    tissue = run_client("tissue", address, "--out", tmp_path / "tissue")
    assert tissue.code == 0, tissue.err
    assert f"S,{address}," in (tmp_path / "tissue" / "tissue.csv").read_text()
    drawn = run_client(
        "attribute",
        out / "S.h5",
        "--slide",
        address,
        "--url",
        triton_url,
        "--no-checks",
        "--method",
        "occlusion",
    )
    assert drawn.code == 0, drawn.err
