"""A batch of 1,000 small slides over two servers, through 40 faults: is anything lost, failed or different?

The faults come at random places of the batch, the same for the same seed, while a request that makes no sense
is sent every second. A batch that is killed is started again, as a user would. Exits 1 where a slide is lost
or failed, an output differs from those of an undisturbed run by a byte, or memory grows.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated

import numpy as np
import psutil
import typer

from benchmarks.common import (
    MACHINE,
    PAGES,
    REAL_SLIDE,
    ROOT,
    Pages,
    console,
    exported,
    resident_mib,
    run_driver,
    table,
    write_page,
)
from client.arrays import Array
from client.errors import ClientError, ServerUnavailable
from client.outputs.records import FAILED
from client.slides.slide import open_slide
from client.triton.connection import Connection
from client.triton.contract import read_contract
from client.triton.endpoint import Endpoint
from gigapath_contract.schema import Contract
from server.local import LOOPBACK, RunningServer, run_triton
from server.ports import free_port
from training.cohort.pyramid import write_pyramid

PAUSE_S = 20.0
"""How long a stopped process stands, and at most a full disk."""
SLOW_TILES = 15_000
DISK_MIB = 1024
GROWTH = 1.2
"""How much more memory the last two fifths of the time may take at their peak than the first three."""
CHANGING = ("status.csv", ".lock")
"""What depends on when and how fast the work was done, besides the records."""


class Supervised:
    """A server at a port of its own that is started again whenever it ends, as `make serve` does."""

    def __init__(self, repository: Path, log: Path) -> None:
        self.port = free_port(LOOPBACK)
        self.url = f"{LOOPBACK}:{self.port}"
        self.starts = 0
        self._repository, self._log = repository, log
        self._running: RunningServer | None = None
        self._up, self._stopping = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._supervise)
        self._thread.start()

    def up(self) -> RunningServer:
        """The server, once it answers."""
        while not self._up.wait(1):
            if not self._thread.is_alive():
                raise ServerUnavailable(f"the server did not start: see {self._log}")
        assert self._running is not None
        return self._running

    def memory(self) -> float:
        """Resident MiB, 0 while it is away."""
        return resident_mib(self._running.pid) if self._running and self._up.is_set() else 0.0

    def stop(self) -> None:
        """End it for good."""
        self._stopping.set()
        if self._running:
            self._running.process.terminate()
        self._thread.join()

    def _supervise(self) -> None:
        while not self._stopping.is_set():
            log = self._log.with_suffix(f".{self.starts}.log")
            with run_triton(self._repository, log=log, grpc_port=self.port, grace=10) as self._running:
                self.starts += 1
                self._up.set()
                self._running.wait()
                self._up.clear()


class Batch:
    """The command `client batch`, its outputs on a disk of its own; started again when it is killed."""

    def __init__(self, slides: Path, work: Path, urls: str) -> None:
        self.out = work / "out"
        self.out.mkdir(parents=True)
        mount = f'mount -t tmpfs -o size={DISK_MIB}m disk "$0" && echo && exec sleep infinity'
        self._disk = subprocess.Popen(
            ["unshare", "--map-root-user", "--mount", "sh", "-c", mount, str(self.out)],
            stdout=subprocess.PIPE,
        )
        assert self._disk.stdout is not None
        self._disk.stdout.readline()
        self.seen = Path(f"/proc/{self._disk.pid}/root{self.out}")
        """The outputs, as they are seen from here."""
        inside = ["nsenter", f"--target={self._disk.pid}", "--user", "--preserve-credentials", "--mount"]
        self._command = [
            *(*inside, f"--wd={ROOT}", sys.executable, "-m", "client", "batch", str(slides)),
            *("--out", str(self.out), "--url", urls, "--slides", "3"),
        ]
        self._log = (work / "batch.log").open("w")
        self.runs = 0
        self.process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        self.runs += 1
        return subprocess.Popen(self._command, stdout=self._log, stderr=self._log)

    def kill(self) -> None:
        """Kill the client as a crash would, and start it again."""
        self.process.kill()
        self.process.wait()
        self.process = self._start()

    def done(self) -> int:
        """Slides with a record."""
        return sum(1 for _ in self.seen.glob("*/records/*.json"))

    def close(self) -> None:
        """End it and its disk."""
        for process in (self.process, self._disk):
            process.kill()
            process.wait()
        self._log.close()


def main(
    slides: Annotated[int, typer.Option(min=1, help="Slides of the batch.")] = 1000,
    faults: Annotated[int, typer.Option(min=0, help="Faults on its way.")] = 40,
    seed: Annotated[int, typer.Option(min=0, help="Decides which faults, and when.")] = 0,
    pages: Pages = PAGES,
) -> None:
    """Disturb a batch of slides in every way, and hold its outputs against an undisturbed run's."""
    repository, chance = exported("demo"), random.Random(seed)
    with ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        make_slides(work / "slides", slides, seed)
        servers = [Supervised(repository, work / f"server{number}") for number in range(2)]
        for server in servers:
            stack.callback(server.stop)
        urls = ",".join(server.url for server in servers)
        for server in servers:
            server.up()
        undisturbed, _ = watched(stack, Batch(work / "slides", work / "undisturbed", urls), servers)
        batch = Batch(work / "slides", work / "disturbed", urls)
        with Connection(Endpoint(servers[0].url)) as connection:
            contract = read_contract(connection)
        with hostile(servers, contract) as requests:
            plan = planned(slides, faults, chance)
            met: Counter[str] = Counter()
            disturbing = threading.Thread(
                target=disturb, args=(plan, batch, servers, contract, chance, met), daemon=True
            )
            disturbing.start()
            disturbed, samples = watched(stack, batch, servers, until=disturbing)
        write_report(pages, slides, met, requests, batch, undisturbed, disturbed, samples, faults)


Fault = Callable[[Batch, Supervised, Contract], None]


def kill_client(batch: Batch, server: Supervised, contract: Contract) -> None:
    """SIGKILL to the client; it is started again."""
    batch.kill()


def stop_client(batch: Batch, server: Supervised, contract: Contract) -> None:
    """SIGSTOP to the client for a while."""
    paused(batch.process.pid)


def kill_server(batch: Batch, server: Supervised, contract: Contract) -> None:
    """SIGKILL to a server."""
    os.kill(server.up().pid, signal.SIGKILL)


def kill_stub(batch: Batch, server: Supervised, contract: Contract) -> None:
    """SIGKILL to the process that computes one of a server's models."""
    pid = server.up().pid
    stubs = [p for p in psutil.Process(pid).children() if any("stub" in part for part in p.cmdline())]
    if not stubs:
        raise psutil.NoSuchProcess(pid)
    random.Random(server.starts).choice(stubs).kill()


def restart_server(batch: Batch, server: Supervised, contract: Contract) -> None:
    """SIGTERM to a server: it finishes what it can and ends."""
    os.kill(server.up().pid, signal.SIGTERM)


def stop_server(batch: Batch, server: Supervised, contract: Contract) -> None:
    """SIGSTOP to a server for a while: it accepts requests and answers nothing."""
    paused(server.up().pid)


def slow_request(batch: Batch, server: Supervised, contract: Contract) -> None:
    """Another client's slide, thousands of times as large, whose client goes away."""
    width = contract.tile_encoder.embed_dim
    inputs: dict[str, Array] = {
        "EMBEDDINGS": np.zeros((SLOW_TILES, width), np.float32),
        "COORDS": np.zeros((SLOW_TILES, 2), np.int64),
    }
    server.up()
    with contextlib.suppress(ClientError), Connection(Endpoint(server.url, timeout=1, retry_for=0)) as other:
        other.infer("slide_encoder", inputs, ["SLIDE"])


def fill_disk(batch: Batch, server: Supervised, contract: Contract) -> None:
    """Somebody fills the disk, and frees it a while later."""
    ballast = batch.seen / "ballast"
    with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(1 << 20))
    try:
        time.sleep(PAUSE_S / 4)
    finally:
        ballast.unlink()


FAULTS: dict[str, Fault] = {
    "client killed": kill_client,
    "client stopped for {pause} s": stop_client,
    "server killed": kill_server,
    "stub killed": kill_stub,
    "orderly restart of a server": restart_server,
    "server stopped for {pause} s": stop_server,
    "another client's slow request": slow_request,
    "disk full, and freed": fill_disk,
}


def planned(slides: int, faults: int, chance: random.Random) -> list[tuple[int, str]]:
    """After how many slides which fault comes: each kind as often as the others, in random order."""
    kinds = [name for number in range(faults) for name in [list(FAULTS)[number % len(FAULTS)]]]
    chance.shuffle(kinds)
    return list(zip(sorted(chance.randrange(slides) for _ in kinds), kinds, strict=True))


def disturb(
    plan: list[tuple[int, str]],
    batch: Batch,
    servers: list[Supervised],
    contract: Contract,
    chance: random.Random,
    met: Counter[str],
) -> None:
    """Bring about each fault once the batch is so far; `met` counts them."""
    for due, name in plan:
        while batch.done() < due and batch.process.poll() is None:
            time.sleep(0.05)
        while True:
            try:
                FAULTS[name](batch, chance.choice(servers), contract)
            except (ProcessLookupError, psutil.NoSuchProcess):
                time.sleep(0.5)  # it has just died of the last one: this is due when it is back
            else:
                break
        met[name] += 1


def paused(pid: int) -> None:
    """Stop a process for a while."""
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        process.suspend()
        try:
            time.sleep(PAUSE_S)
        finally:
            process.resume()


@contextmanager
def hostile(servers: list[Supervised], contract: Contract) -> Iterator[Counter[str]]:
    """Send a request that makes no sense to a server every second; yields the answers' counts."""
    width, ended, answers = contract.tile_encoder.embed_dim, threading.Event(), Counter[str]()
    two = np.zeros((2, width), np.float32)
    senseless: list[tuple[str, dict[str, Array]]] = [
        ("slide_encoder", {"EMBEDDINGS": two[:1], "COORDS": np.zeros((5, 2), np.int64)}),
        ("slide_encoder", {"EMBEDDINGS": two[:0], "COORDS": np.zeros((0, 2), np.int64)}),
        ("slide_encoder", {"EMBEDDINGS": two * np.nan, "COORDS": np.zeros((2, 2), np.int64)}),
        ("slide_encoder", {"EMBEDDINGS": two, "COORDS": np.full((2, 2), -(1 << 62), np.int64)}),
        ("slide_encoder", {"EMBEDDINGS": two.astype(np.float64), "COORDS": np.zeros((2, 2), np.int64)}),
        ("slide_occlusion", {"EMBEDDINGS": two, "COORDS": np.zeros((2, 2), np.int64),
                             "KEEP": np.ones((2_000_000, 2), np.bool_)}),
        ("tile_encoder", {"TILES": np.zeros((1, 7, 7, 3), np.uint8)}),
        ("tile_encoder", {"PIXELS": np.zeros((1, 224, 224, 3), np.uint8)}),
        ("no_such_model", {"TILES": np.zeros((1, 224, 224, 3), np.uint8)}),
    ]  # fmt: skip

    def send() -> None:
        number = 0
        while not ended.wait(1):
            number += 1
            server = servers[number % len(servers)]
            model, inputs = senseless[number // len(servers) % len(senseless)]
            try:
                with Connection(Endpoint(server.url, timeout=10, retry_for=0)) as connection:
                    connection.infer(model, inputs, ["LOGITS"])
                answers["answered"] += 1
            except ServerUnavailable:
                answers["not reached"] += 1
            except ClientError:
                answers["refused"] += 1
            with contextlib.suppress(OSError), socket.create_connection((LOOPBACK, server.port), 1) as raw:
                raw.sendall(os.urandom(64))

    thread = threading.Thread(target=send)
    thread.start()
    try:
        yield answers
    finally:
        ended.set()
        thread.join()


def watched(
    stack: ExitStack, batch: Batch, servers: list[Supervised], until: threading.Thread | None = None
) -> tuple[dict[str, str], dict[str, list[float]]]:
    """Wait for a batch to end: digests of its files, and the memory of client and servers by second."""
    stack.callback(batch.close)
    samples: dict[str, list[float]] = {"client": [], "servers": []}
    while (batch.process.poll() is None) or (until and until.is_alive()):
        time.sleep(1)
        with contextlib.suppress(psutil.NoSuchProcess):
            # Without its children: slides that were begun when a run died get a process of their own.
            samples["client"].append(psutil.Process(batch.process.pid).memory_info().rss / 2**20)
        with contextlib.suppress(psutil.NoSuchProcess):
            samples["servers"].append(max(server.memory() for server in servers))
    return digests(batch.seen), samples


def digests(out: Path) -> dict[str, str]:
    """SHA-256 of every output, less what depends on when it was made."""
    files = [path for path in out.rglob("*") if path.is_file() and path.name not in CHANGING]
    return {
        path.relative_to(out).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
        if path.parent.name != "records"
    }


def make_slides(folder: Path, count: int, seed: int) -> None:
    """Slides of 768 x 512 px, each another piece of the real slide's tissue."""
    folder.mkdir()
    with open_slide(REAL_SLIDE) as slide:
        tissue = slide.read(0, (700, 0), (1280, 2900))
    rng = np.random.default_rng(seed)
    for number in range(count):
        top, left = rng.integers(0, [tissue.shape[0] - 512, tissue.shape[1] - 768])
        write_pyramid(folder / f"slide-{number:04}.tif", tissue[top : top + 512, left : left + 768])


def write_report(
    pages: Path,
    slides: int,
    met: Counter[str],
    hostile_requests: Counter[str],
    batch: Batch,
    undisturbed: dict[str, str],
    disturbed: dict[str, str],
    samples: dict[str, list[float]],
    faults: int,
) -> None:
    """The page, and exit code 1 where a check fails."""
    with next(batch.seen.glob("*/status.csv")).open() as file:
        rows = list(csv.DictReader(file))
    ended, answered = batch.process.returncode, hostile_requests["answered"]
    failed = [row for row in rows if row["status"] == FAILED]
    for row in failed:
        console.print(f"{row['slide_id']}: {row['reason']}")
    different = {name for name, _ in undisturbed.items() ^ disturbed.items()}
    for name in sorted(different)[:10]:
        console.print(f"differs: {name}")
    peaks = {name: [max(fifth) for fifth in np.array_split(values, 5)] for name, values in samples.items()}
    checks = [
        ("faults", f"{met.total()}", met.total() == faults),
        ("slides lost", f"{slides - len({row['slide_id'] for row in rows})}", len(rows) == slides),
        ("slides failed", f"{len(failed)}", not failed),
        (
            f"files unlike those of an undisturbed run, of {len(undisturbed)}",
            f"{len(different)}",
            not different,
        ),
        ("exit code of the last run of the batch", f"{ended}", ended == 0),
        ("hostile requests answered as if they made sense", f"{answered}", answered == 0),
        *(
            (
                f"peak memory of {name} by fifths of the time, MiB",
                ", ".join(f"{peak:.0f}" for peak in found),
                max(found[3:]) <= GROWTH * max(found[:3]),
            )
            for name, found in peaks.items()
        ),
    ]
    options = "" if slides == 1000 else f' ARGS="--slides {slides}"'
    lines = [
        f"slides, servers | {len(rows)}, 2",
        *(f"{name.format(pause=f'{PAUSE_S:g}')} | {met[name]} times" for name in FAULTS),
        f"hostile requests, one per second | {hostile_requests.total()}",
        f"starts of the batch | {batch.runs}",
        *(f"{name} | {value}{'' if passed else ' — FAILED'}" for name, value, passed in checks),
    ]
    command = f"make bench NAME=faults{options}"
    page = f"""# Faults

Written by `{command}` (demo preset, loopback; servers and client share one machine, {MACHINE}).

{table("|", lines)}

A slide is 768x512 px: faults hit its start and end most often. The request that ends Triton 2.51 by its shape
is not among the hostile ones: only a front stops it (`docs/security.md`).
"""
    write_page(pages / "faults.md", page, passed=all(passed for *_, passed in checks))


if __name__ == "__main__":
    run_driver(main)
