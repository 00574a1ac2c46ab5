"""A batch of 1,000 small slides over two servers, through 40 faults: is anything lost, failed or different?

The faults come at random places of the batch, the same for the same seed, also while others last, and a
request that makes no sense is sent every second. A batch that is killed is started again, as a user would.
Exits 1 where a slide is lost or failed, an output differs from those of an undisturbed run by a byte, or
memory grows. What was found so far lies in build/bench/faults.json.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import json
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
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
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
    WORK,
    Pages,
    console,
    digests,
    exported,
    resident_mib,
    table,
    write_page,
)
from client.arrays import Array
from client.errors import ClientError, DeadlineExceeded, ServerUnavailable
from client.outputs.records import FAILED
from client.slides.slide import open_slide
from client.triton.connection import Connection
from client.triton.contract import read_contract
from client.triton.endpoint import Endpoint
from gigapath_contract.files import write_text
from gigapath_contract.schema import Contract
from server.local import LOOPBACK, RunningServer, run_triton
from server.ports import free_port
from tests.support.pyramid import write_pyramid

PAUSE_S = 20.0
"""How long a stopped process stands, and at most a full disk."""
SLOW_TILES = 15_000
DISK_MIB = 1024
GROWTH = 1.2
"""How much more memory a process may hold at the peak of the last two fifths of the time than before."""
LONGEST_S = 20 * 60
"""When a batch that does not end is killed."""
STATE = WORK / "faults.json"
CHANGING = {"records", "status.csv", ".lock"}
"""What depends on when and how fast the work was done."""


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
                if not self._stopping.is_set():  # `stop` may have come while the server started
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
        self._changing = threading.Lock()
        self.runs = 0
        self.process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        self.runs += 1
        return subprocess.Popen(self._command, stdout=self._log, stderr=self._log)

    def kill(self) -> None:
        """Kill the client as a crash would, and start it again."""
        with self._changing:
            self.process.kill()
            self.process.wait()
            self.process = self._start()

    def running(self) -> bool:
        """Whether it has not ended by itself."""
        with self._changing:
            return self.process.poll() is None

    def done(self) -> int:
        """Slides with a record."""
        return sum(1 for _ in self.seen.glob("*/records/*.json"))

    def close(self) -> None:
        """End it and its disk."""
        for process in (self.process, self._disk):
            process.kill()
            process.wait()
        self._log.close()


@dataclass
class Findings:
    """What the page says, written to STATE as it is found."""

    slides: int
    faults: int
    met: list[str] = field(default_factory=list)
    hostile: list[str] = field(default_factory=list)  # what each hostile request met
    seconds: dict[str, float] = field(default_factory=dict)  # of each batch
    memory: dict[str, list[float]] = field(default_factory=dict)  # MiB of each process, by second
    files: int = 0
    runs: int = 0
    ended: int | None = None
    lost: int | None = None
    failed: list[str] | None = None
    different: list[str] | None = None

    def keep(self) -> None:
        """Write it down."""
        STATE.parent.mkdir(parents=True, exist_ok=True)
        write_text(STATE, json.dumps(dataclasses.asdict(self)))


def main(
    slides: Annotated[int, typer.Option(min=1, help="Slides of the batch.")] = 1000,
    faults: Annotated[int, typer.Option(min=0, help="Faults on its way.")] = 40,
    seed: Annotated[int, typer.Option(min=0, help="Decides which faults, and when.")] = 0,
    page_only: Annotated[
        bool, typer.Option("--page-only", help="Write the page of the last run, also of one that broke off.")
    ] = False,
    pages: Pages = PAGES,
) -> None:
    """Disturb a batch of slides in every way, and hold its outputs against an undisturbed run's."""
    found = Findings(**json.loads(STATE.read_text())) if page_only else measure(slides, faults, seed)
    passed, page = report(found)
    write_page(pages / "faults.md", page, passed=passed)


def measure(slides: int, faults: int, seed: int) -> Findings:
    """Run the batch undisturbed, then disturbed, and compare."""
    repository, found = exported("demo"), Findings(slides, faults)
    with ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        make_slides(work / "slides", slides, seed)
        servers = [Supervised(repository, work / f"server{number}") for number in range(2)]
        for server in servers:
            stack.callback(server.stop)
        urls = ",".join(server.url for server in servers)
        for server in servers:
            server.up()
        calm = Batch(work / "slides", work / "undisturbed", urls)
        stack.callback(calm.close)
        watch(calm, "undisturbed", servers, found)
        undisturbed = digests(calm.seen, CHANGING)
        found.files = len(undisturbed)
        batch = Batch(work / "slides", work / "disturbed", urls)
        stack.callback(batch.close)
        with Connection(Endpoint(servers[0].url)) as connection:
            contract = read_contract(connection)
        plan = planned(slides, faults, random.Random(seed), servers)
        disturbing = threading.Thread(target=disturb, args=(plan, batch, contract, found.met), daemon=True)
        with hostile(servers, contract, found.hostile):
            disturbing.start()
            watch(batch, "disturbed", servers, found, until=disturbing)
        found.runs, found.ended = batch.runs, batch.process.returncode
        rows = status(batch.seen)
        found.lost = slides - len({row["slide_id"] for row in rows})
        found.failed = [f"{row['slide_id']}: {row['reason']}" for row in rows if row["status"] == FAILED]
        found.different = sorted(
            {name for name, _ in undisturbed.items() ^ digests(batch.seen, CHANGING).items()}
        )
        found.keep()
    return found


Fault = Callable[[Batch, Supervised, Contract], None]


def kill_stub(batch: Batch, server: Supervised, contract: Contract) -> None:
    """SIGKILL to the process that computes one of a server's models."""
    pid = server.up().pid
    stubs = [p for p in psutil.Process(pid).children() if any("stub" in part for part in p.cmdline())]
    if not stubs:
        raise psutil.NoSuchProcess(pid)
    stubs[server.starts % len(stubs)].kill()


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
    with tempfile.TemporaryFile(dir=batch.seen, buffering=0) as ballast:
        with contextlib.suppress(OSError):
            while True:
                ballast.write(bytes(1 << 20))
        time.sleep(PAUSE_S / 4)


FAULTS: dict[str, Fault] = {
    "client killed": lambda batch, server, contract: batch.kill(),
    "client stopped for {pause} s": lambda batch, server, contract: paused(batch.process.pid),
    "server killed": lambda batch, server, contract: os.kill(server.up().pid, signal.SIGKILL),
    "stub killed": kill_stub,
    "orderly restart of a server": lambda batch, server, contract: os.kill(server.up().pid, signal.SIGTERM),
    "server stopped for {pause} s": lambda batch, server, contract: paused(server.up().pid),
    "another client's slow request": slow_request,
    "disk full, and freed": fill_disk,
}


def planned(
    slides: int, faults: int, chance: random.Random, servers: list[Supervised]
) -> list[tuple[int, str, Supervised]]:
    """After how many slides which fault comes, to which server: each kind as often, in random order."""
    kinds = [list(FAULTS)[number % len(FAULTS)] for number in range(faults)]
    chance.shuffle(kinds)
    places = sorted(chance.randrange(slides) for _ in kinds)
    return [(place, kind, chance.choice(servers)) for place, kind in zip(places, kinds, strict=True)]


def disturb(
    plan: list[tuple[int, str, Supervised]], batch: Batch, contract: Contract, met: list[str]
) -> None:
    """Bring about each fault once the batch is so far, also while others last; `met` lists them."""

    def bring_about(name: str, server: Supervised) -> None:
        while True:
            try:
                FAULTS[name](batch, server, contract)
            except (ProcessLookupError, psutil.NoSuchProcess):
                time.sleep(0.5)  # it has just died of the last one: this is due when it is back
            else:
                break
        met.append(name)

    with ThreadPoolExecutor(max(1, len(plan))) as pool:
        for due, name, server in plan:
            while batch.done() < due and batch.running():
                time.sleep(0.1)
            if batch.running():
                pool.submit(bring_about, name, server)


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
def hostile(servers: list[Supervised], contract: Contract, met: list[str]) -> Iterator[None]:
    """Send a request that makes no sense to a server every second; `met` lists what each met."""
    width, ended = contract.tile_encoder.embed_dim, threading.Event()
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

    def send(server: Supervised, model: str, inputs: dict[str, Array]) -> None:
        try:
            with Connection(Endpoint(server.url, timeout=10, retry_for=0)) as connection:
                connection.infer(model, inputs, ["LOGITS"])
            met.append("answered")
        except (ServerUnavailable, DeadlineExceeded):
            met.append("not reached")
        except ClientError:
            met.append("refused")
        with contextlib.suppress(OSError), socket.create_connection((LOOPBACK, server.port), 1) as raw:
            raw.sendall(os.urandom(64))

    def send_every_second() -> None:
        with ThreadPoolExecutor(16) as pool:  # a stopped server answers late
            number = 0
            while not ended.wait(1):
                number += 1
                server = servers[number % len(servers)]
                pool.submit(send, server, *senseless[number // len(servers) % len(senseless)])

    thread = threading.Thread(target=send_every_second)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def watch(
    batch: Batch,
    name: str,
    servers: list[Supervised],
    found: Findings,
    until: threading.Thread | None = None,
) -> None:
    """Wait for a batch to end, and note the memory of each process every second."""
    began = time.monotonic()
    while batch.running() or (until and until.is_alive()):
        time.sleep(1)
        # Without its children: slides that were begun when a run died get a process of their own.
        with contextlib.suppress(psutil.NoSuchProcess):
            client = psutil.Process(batch.process.pid).memory_info().rss / 2**20
            found.memory.setdefault(f"client, {name}", []).append(client)
        for number, server in enumerate(servers, 1):
            with contextlib.suppress(psutil.NoSuchProcess):
                found.memory.setdefault(f"server {number}, {name}", []).append(server.memory())
        found.seconds[name] = round(time.monotonic() - began, 1)
        found.keep()
        if found.seconds[name] > LONGEST_S:
            batch.process.kill()
            batch.process.wait()
            break


def status(out: Path) -> list[dict[str, str]]:
    """The rows of a batch's table, none where it has not ended."""
    rows: list[dict[str, str]] = []
    for path in out.glob("*/status.csv"):
        with path.open() as file:
            rows += csv.DictReader(file)
    return rows


def make_slides(folder: Path, count: int, seed: int) -> None:
    """Slides of 768 x 512 px, each another piece of the real slide's tissue."""
    folder.mkdir()
    with open_slide(REAL_SLIDE) as slide:
        tissue = slide.read(0, (700, 0), (1280, 2900))
    rng = np.random.default_rng(seed)
    for number in range(count):
        top, left = rng.integers(0, [tissue.shape[0] - 512, tissue.shape[1] - 768])
        write_pyramid(folder / f"slide-{number:04}.tif", tissue[top : top + 512, left : left + 768])


def report(found: Findings) -> tuple[bool, str]:
    """Whether every check passes, and the page."""
    for line in [*(found.failed or []), *(f"differs: {name}" for name in (found.different or [])[:10])]:
        console.print(line)
    met, hostile_met = Counter(found.met), Counter(found.hostile)
    memory = {
        name: [max(part, default=0.0) for part in np.array_split(held, 5)]
        for name, held in found.memory.items()
    }
    growth = {name: max(peaks[3:]) / max(*peaks[:3], 1) for name, peaks in memory.items()}
    checks = [
        ("faults", len(found.met), len(found.met) == found.faults),
        ("slides lost", found.lost, found.lost == 0),
        ("slides failed", _count(found.failed), found.failed == []),
        (
            f"files unlike those of an undisturbed run, of {found.files}",
            _count(found.different),
            found.different == [],
        ),
        ("exit code of the last run of the batch", found.ended, found.ended == 0),
        (
            "hostile requests answered as if they made sense",
            hostile_met["answered"],
            not hostile_met["answered"],
        ),
    ]
    options = "" if found.slides == 1000 else f' ARGS="--slides {found.slides}"'
    lines = [
        f"slides, servers | {found.slides}, 2",
        *(f"{name.format(pause=f'{PAUSE_S:g}')} | {met[name]} times" for name in FAULTS),
        f"hostile requests, one per second | {hostile_met.total()}",
        f"starts of the batch | {found.runs}",
        *(f"seconds, {name} | {seconds:.0f}" for name, seconds in found.seconds.items()),
        *(f"{name} | {value}{'' if passed else ' — FAILED'}" for name, value, passed in checks),
    ]
    by_time = [
        f"{name} | {' | '.join(f'{peak:.0f}' for peak in peaks)} | {growth[name]:.2f}"
        f"{'' if growth[name] <= GROWTH else ' — FAILED'}"
        for name, peaks in memory.items()
    ]
    command = f"make bench NAME=faults{options}"
    page = f"""# Faults

Written by `{command}` (demo preset, loopback; servers and client share one machine, {MACHINE}).

{table("|", lines)}

Memory of each process in MiB, at its peak in each fifth of the time. Growth is the peak of the last two
fifths over that of the first three, at most {GROWTH}. While disturbed, processes die and are started again.

{table("process | 1 | 2 | 3 | 4 | 5 | growth", by_time)}

A slide is 768x512 px: faults hit its start and end most often. The request that ends Triton 2.51 by its shape
is not among the hostile ones: only a front stops it (`docs/security.md`).
"""
    return all(passed for *_, passed in checks) and max(growth.values(), default=0) <= GROWTH, page


def _count(names: list[str] | None) -> int | None:
    return None if names is None else len(names)
