"""`make bench-serve`: what Triton and gRPC cost, as tiles a second over those of a bare ONNX Runtime session.

Both sides get the same batches and session options, each in a process of its own, in turns within one run;
the figure is the median of the rounds' ratios. Exits 1 where it misses its target or an embedding differs.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import tritonclient.grpc as triton
import typer
from rich.progress import track

from server.assemble import ROOT
from server.backends.onnxruntime.onnx_session import open_session
from server.errors import ServerError
from server.local import run_triton

TARGETS = {"demo": 0.90, "gigapath-flash": 0.97}
MODEL = "tile_encoder"
BATCH = 64
Embeddings = npt.NDArray[np.float32]
Run = Callable[[int], tuple[float, Embeddings]]
"""Encode so many batches: seconds, and the last batch's embeddings."""


@dataclass(frozen=True)
class Comparison:
    """A preset's rates in tiles a second, a pair a round."""

    preset: str
    bare: list[float]
    served: list[float]

    @property
    def ratios(self) -> list[float]:
        """Served over bare, round by round."""
        return [served / bare for served, bare in zip(self.served, self.bare, strict=True)]

    @property
    def good(self) -> bool:
        """Whether the median ratio reaches the preset's target."""
        return statistics.median(self.ratios) >= TARGETS.get(self.preset, 0)

    def row(self) -> str:
        """A line of the page's table."""
        ratios = self.ratios
        return (
            f"| {self.preset} | {statistics.median(self.bare):.1f} | {statistics.median(self.served):.1f} "
            f"| **{statistics.median(ratios):.3f}** | {min(ratios):.3f}–{max(ratios):.3f} | {len(ratios)} "
            f"| {TARGETS.get(self.preset, '–')}{'' if self.good else ' — MISSED'} |"
        )


def bare_side(path: Path, config: dict[str, Any]) -> Run:
    """A session without Triton, with the served session options."""
    session = open_session(path, config)
    batches = random_batches()

    def run(count: int) -> tuple[float, Embeddings]:
        began = time.perf_counter()
        for number in range(count):
            (embeddings,) = session.run(["EMBEDDINGS"], {"TILES": batches[number % len(batches)]})
        return time.perf_counter() - began, embeddings

    return run


def served_side(url: str, in_flight: int) -> Run:
    """A gRPC client that keeps `in_flight` requests under way."""
    client = triton.InferenceServerClient(url)
    batches = random_batches()

    def run(count: int) -> tuple[float, Embeddings]:
        free = threading.Semaphore(in_flight)
        answers: dict[int, Any] = {}

        def send(number: int) -> None:
            def done(result: Any, error: Any) -> None:
                answers[number] = error or result
                free.release()

            tiles = triton.InferInput("TILES", [BATCH, 224, 224, 3], "UINT8")
            tiles.set_data_from_numpy(batches[number % len(batches)])
            client.async_infer(MODEL, [tiles], done)

        began = time.perf_counter()
        for number in range(count):
            free.acquire()
            send(number)
        for _ in range(in_flight):
            free.acquire()
        seconds = time.perf_counter() - began
        for answer in answers.values():
            if isinstance(answer, Exception):
                raise answer
        return seconds, answers[count - 1].as_numpy("EMBEDDINGS")

    return run


def random_batches() -> list[npt.NDArray[np.uint8]]:
    """The same three batches [64, 224, 224, 3] in every process."""
    random = np.random.default_rng(0)
    return [random.integers(0, 256, (BATCH, 224, 224, 3), np.uint8) for _ in range(3)]


@contextmanager
def own_process(side: Callable[..., Run], *arguments: Any) -> Iterator[Run]:
    """`side(*arguments)` in a fresh process, called from this one."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_answer, args=(there, side, arguments), daemon=True)
    process.start()
    there.close()

    def run(count: int) -> tuple[float, Embeddings]:
        here.send(count)
        try:
            seconds, embeddings = here.recv()
        except EOFError:
            raise ServerError("a measuring process failed; its own words are above") from None
        return seconds, embeddings

    try:
        yield run
    finally:
        here.close()
        process.join()


def _answer(pipe: Connection, side: Callable[..., Run], arguments: tuple[Any, ...]) -> None:
    run = side(*arguments)
    while True:
        try:
            pipe.send(run(pipe.recv()))
        except EOFError:
            return


def compare(repository: Path, *, seconds: float, rounds: int, in_flight: int) -> Comparison:
    """Serve `repository` and measure its tile encoder against the bare session.

    Raises ServerError where a served embedding differs from the bare one.
    """
    with (
        tempfile.TemporaryDirectory() as scratch,
        run_triton(repository, log=Path(scratch) / "triton.log") as server,
    ):
        with triton.InferenceServerClient(server.url) as client:
            config = client.get_model_config(MODEL, as_json=True)["config"]
        (number,) = config["version_policy"]["specific"]["versions"]
        preset = json.loads(config["parameters"]["contract"]["string_value"])["preset"]
        path = repository / MODEL / number / "model.onnx"
        sides = (own_process(bare_side, path, config), own_process(served_side, server.url, in_flight))
        with sides[0] as bare, sides[1] as served:
            served(2)
            bare(2)
            count = max(4, round(seconds / (bare(2)[0] / 2)))
            rates: dict[Run, list[float]] = {bare: [], served: []}
            for turn in track(range(rounds), description=preset):
                embeddings = {}
                for run in (bare, served) if turn % 2 == 0 else (served, bare):
                    took, last = run(count)
                    rates[run].append(count * BATCH / took)
                    embeddings[run] = last
                if not np.array_equal(embeddings[served], embeddings[bare]):
                    raise ServerError(f"{preset}: served embeddings differ from the bare session's")
    return Comparison(preset, rates[bare], rates[served])


def page(comparisons: list[Comparison], in_flight: int) -> str:
    """The benchmark page."""
    rows = "\n".join(comparison.row() for comparison in comparisons)
    return f"""# What Triton and gRPC cost

Written by `make bench-serve`: {os.cpu_count()} cores, no GPU, Triton 2.51 over loopback gRPC, ONNX Runtime
{version("onnxruntime")}, client, server and session on the same cores.

| preset | bare session, tiles/s | through Triton, tiles/s | median ratio | range | rounds | target |
|---|---|---|---|---|---|---|
{rows}

Requests hold {BATCH} tiles (9.6 MB), {in_flight} are under way. The bare session has the served session
options and runs the same batches in a process of its own, in turns with the served rounds. Every round's last
embeddings are compared with the bare session's: difference 0.0. Read the ratios: the machine's speed changes
from minute to minute.
"""


def main(
    repositories: Annotated[list[Path], typer.Argument(help="Exported model repositories.")],
    seconds: Annotated[float, typer.Option(help="Length of a round.")] = 4,
    rounds: Annotated[int, typer.Option(help="Rounds a preset.")] = 9,
    in_flight: Annotated[int, typer.Option(help="Requests under way.")] = 2,
    output: Annotated[Path, typer.Option(help="Where the page goes.")] = ROOT / "docs/benchmarks/serve.md",
) -> None:
    """Compare served tile encoders with bare ONNX Runtime sessions.

    Example: python -m benchmarks.triton_overhead build/bench/demo
    """
    try:
        comparisons = [
            compare(path, seconds=seconds, rounds=rounds, in_flight=in_flight) for path in repositories
        ]
    except ServerError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(1)
    text = page(comparisons, in_flight)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(text)
    typer.echo(text)
    sys.exit(not all(comparison.good for comparison in comparisons))


if __name__ == "__main__":
    typer.run(main)
