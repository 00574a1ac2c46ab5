"""Reading a plan: in order, the same bytes however many threads, little memory, nothing left behind."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
import tracemalloc
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from client.arrays import Pixels
from client.errors import SlideError
from client.reading.jpeg_reader import JpegReader
from client.reading.stream import read_tiles
from tests.support.pyramid import write_pyramid


def test_the_real_slide_is_openslides_bytes(real_slide: Path, reading: SimpleNamespace) -> None:
    tiles = reading.plan(real_slide)
    pixels, valid, readers = reading.collect(tiles)
    assert readers == {JpegReader.name}
    assert pixels.shape == (108, 224, 224, 3)
    assert valid.all()
    for index, expected in enumerate(reading.plainly(tiles)):
        assert np.array_equal(pixels[index], expected), index


@pytest.mark.parametrize("mpp", [0.5, 0.7])
def test_workers_and_batches_change_nothing(real_slide: Path, mpp: float, reading: SimpleNamespace) -> None:
    tiles = reading.plan(real_slide, mpp=mpp)
    expected = reading.collect(tiles, workers=1, batch=64)[0]
    for workers, batch in [(4, 64), (4, 7), (2, 1), (3, 1000)]:
        assert np.array_equal(reading.collect(tiles, workers=workers, batch=batch)[0], expected)


def test_batches_are_in_order_and_start_anywhere(real_slide: Path, reading: SimpleNamespace) -> None:
    tiles = reading.plan(real_slide)
    whole = reading.collect(tiles)[0]
    for start in (0, 1, 50, 107, 108):
        batches = list(read_tiles(tiles, batch=32, start=start))
        assert [batch.start for batch in batches] == list(range(start, 108, 32))
        if batches:
            assert np.array_equal(np.concatenate([batch.pixels for batch in batches]), whole[start:])


@pytest.mark.parametrize("mpp", [0.5, 1.0])
def test_memory_does_not_grow_with_the_slide(
    tmp_path: Path, picture: Pixels, mpp: float, reading: SimpleNamespace
) -> None:
    """Four times the rows, the same width."""

    def peak(rows: int) -> int:
        path = write_pyramid(
            tmp_path / f"{rows}.tif", picture[:2160, :1200], size=(1200, rows * 256), tile=240
        )
        tiles = reading.plan(path, mpp=mpp)
        tracemalloc.start()
        count = sum(len(batch.valid) for batch in read_tiles(tiles, batch=4))
        highest = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert count == len(tiles)
        return highest

    peak(8)  # what is imported on the way
    assert peak(160) < 1.2 * peak(40)


def test_a_slide_that_vanished(real_slide: Path, tmp_path: Path, reading: SimpleNamespace) -> None:
    path = tmp_path / "a.svs"
    path.write_bytes(real_slide.read_bytes())
    tiles = reading.plan(path)
    path.unlink()
    with pytest.raises(SlideError, match="no such file"):
        next(read_tiles(tiles))


def readers_running() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("read")]


def open_files() -> list[str]:
    return [str(link.readlink()) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]


@pytest.mark.parametrize("layout", ["jpeg", "deflate"])
def test_closing_stops_threads_and_closes_files(
    tmp_path: Path, picture: Pixels, layout: str, reading: SimpleNamespace
) -> None:
    path = tmp_path / "a.tif"
    if layout == "jpeg":
        write_pyramid(path, picture[:1024, :1024], size=(20_480, 20_480))
    else:
        reading.write_deflate(path, picture)
    batches = read_tiles(reading.plan(path), workers=3)
    next(batches)
    assert readers_running()
    assert layout != "jpeg" or str(path) in open_files()  # OpenSlide opens a file when it needs it
    began = time.process_time()
    batches.close()
    assert time.process_time() - began < 2
    assert not readers_running()
    assert str(path) not in open_files()


def test_an_error_in_the_loop_stops_threads(real_slide: Path, reading: SimpleNamespace) -> None:
    def use() -> None:
        with closing(read_tiles(reading.plan(real_slide), batch=4)) as batches:
            for _ in batches:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        use()
    assert not readers_running()


def test_ctrl_c_ends_a_run_at_once(tmp_path: Path, picture: Pixels) -> None:
    path = write_pyramid(tmp_path / "a.tif", picture[:1024, :1024], size=(40_960, 40_960))
    script = (
        "import sys\nfrom pathlib import Path\nfrom client.reading.stream import read_tiles\n"
        "from client.slides.slide import open_slide\nfrom client.slides.tiling import plan_tiles\n"
        "with open_slide(Path(sys.argv[1])) as slide:\n    tiles = plan_tiles(slide, None)\n"
        "for batch in read_tiles(tiles, workers=3):\n    print(batch.start, flush=True)\n"
    )
    root = Path(__file__).resolve().parents[3]
    run = subprocess.Popen(
        [sys.executable, "-c", script, path],
        cwd=root,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert run.stdout is not None
    assert run.stdout.readline() == "0\n"
    run.send_signal(signal.SIGINT)
    read, errors = run.communicate(timeout=120)
    assert run.returncode == -signal.SIGINT
    assert read.count("\n") < 200, "of 400 batches"
    assert errors.strip().endswith("KeyboardInterrupt")


def test_seconds_are_accounted_for(real_slide: Path, reading: SimpleNamespace) -> None:
    tiles = reading.plan(real_slide, mpp=1.0)
    batches = list(read_tiles(tiles, workers=1))
    assert all(batch.read_seconds > 0 for batch in batches)
    assert all(batch.resize_seconds > 0 for batch in batches)
    assert all(batch.resize_seconds == 0 for batch in read_tiles(reading.plan(real_slide)))
