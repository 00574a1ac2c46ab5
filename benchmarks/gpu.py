"""Everything that is served, on this machine's GPU; `--tiny` tries the driver itself on the CPU.

Writes gpu.md and gpu.json. Each section runs in its own process: one that fails takes no other along, and the
page names it. Weights are random, the same for PyTorch and for the exports.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import json
import multiprocessing
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import onnxruntime
import torch
import typer
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.common import (
    CORES,
    MACHINE,
    PAGES,
    WORK,
    alternate,
    console,
    export_into,
    median_ratio,
    run_driver,
    seconds_of,
    slide_of,
    table,
    write_page,
)
from client.batch.job import BatchJob, process_slide
from client.outputs.records import OK
from client.scoring.embedding import Throughput
from client.scoring.score import SlideSource, TilingOptions
from client.scoring.timings import bottleneck
from client.triton.connection import Connection
from client.triton.contract import read_contract
from client.triton.endpoint import Endpoint
from client.triton.parity import load_reference, verify
from export.engines import find_gpu
from export.errors import ExportError
from export.repository import served_version
from export.samples import seeded_coords
from gigapath_contract.schema import Contract
from server.local import run_triton
from training.models.build import build_models
from training.models.presets import get_preset
from training.models.slide_model import SlideModel
from training.models.tile_encoder import TileEncoder

FOLDER = WORK / "gpu"
PRECISIONS = {"fp16": "fp16", "fp16-mixed": "fp32", "fp32": "fp32"}
"""The precisions that are exported, each with that of its `slide_occlusion`."""
IN_FLIGHT = 4
CUDA_OPTIONS = {"use_tf32": "0", "arena_extend_strategy": "kSameAsRequested"}
"""An arena that grows by doubling would keep twice of what the largest slide needs."""
KEPT = (0.9, 0.5)
"""Shares of the tiles that masks keep: about what leave-one-out over regions and Owen values ask for."""
TFLOPS, BUSY, EAGER = "TFLOP/s", "GPU busy, %", "PyTorch eager, autocast"

Tiles = npt.NDArray[np.uint8]
Embeddings = npt.NDArray[np.float32]
Stream = Callable[[Iterable[Tiles]], Iterable[Embeddings]]
"""Embeds batches of tiles, in order."""
Arrays = dict[str, npt.NDArray[Any]]
KeepMask = npt.NDArray[np.bool_]
Row = dict[str, str | int | float | None]
Tables = dict[str, list[Row]]
Repositories = Mapping[str, Path]
"""The model repository of each precision."""


@dataclass(frozen=True)
class Plan:
    """What is measured: `slides` of so many tiles, `masks` of (tiles, masks), a `scored` slide of tiles."""

    device: str
    preset: str
    matrix: int
    batches: tuple[int, ...]
    slides: tuple[int, ...]
    masks: tuple[tuple[int, int], ...]
    scored: int
    trials: int
    seconds: float


FULL = Plan(
    "cuda",
    "gigapath",
    8192,
    (64, 128),
    (1000, 10_000, 100_000),
    ((1000, 64), (2000, 64), (10_000, 16)),
    5000,
    3,
    1.5,
)
TINY = Plan("cpu", "demo", 256, (2, 4), (50, 1100), ((50, 4), (1100, 2)), 12, 2, 0.05)


def matrix_product(plan: Plan, repositories: Repositories) -> Tables:
    """The most that a half-precision matrix product reaches here."""
    size = plan.matrix
    a, b = (torch.randn(size, size, device=plan.device, dtype=half(plan.device)) for _ in range(2))

    def multiply() -> None:
        (a @ b)[0, 0].item()  # waits for the product

    peak = 2 * size**3 / min(seconds_of(multiply) for _ in range(20))
    return {"Matrix product": [{"size": size, TFLOPS: peak / 1e12}]}


def tile_encoder(plan: Plan, repositories: Repositories) -> Tables:
    """Tiles/s from host to host: PyTorch, bare ONNX Runtime sessions and Triton, alternately."""
    encoder = build_models(plan.preset).tile
    flops = flops_per_tile(encoder)
    encoder.to(plan.device)
    tiles = np.random.default_rng(0).integers(0, 256, (max(plan.batches), 224, 224, 3), np.uint8)
    rates, busy, answers = {}, {}, {}
    missing: list[Row] = []
    with ExitStack() as opened, ThreadPoolExecutor(1) as apart:
        for name, make in tile_encoders(encoder, plan.device, repositories, opened).items():
            batches = plan.batches[:1] if name.startswith("torch.compile") else plan.batches
            with console.status(f"preparing {name}"):
                prepared = apart.submit(prepare, make, [tiles[:batch] for batch in batches])
            if reason := outcome(prepared):
                missing.append({"runtime": name, "reason": reason})
                continue
            stream, found = prepared.result()
            for batch, answer in zip(batches, found, strict=True):
                work = partial(rate, stream, tiles[:batch], plan.seconds)
                rates[name, batch], busy[name, batch] = watched(work, plan.device)
                answers[name, batch] = answer
        measured = alternate(rates, plan.trials)
    rows: list[Row] = []
    for (name, batch), own in measured.items():
        eager = (EAGER, batch)
        tiles_per_second = statistics.median(own)
        rows.append(
            {
                "runtime": name,
                "batch": batch,
                "tiles/s": tiles_per_second,
                "lowest": min(own),
                "highest": max(own),
                "to eager autocast": median_ratio(own, measured[eager]) if eager in measured else None,
                TFLOPS: tiles_per_second * flops / 1e12,
                "1 - cosine to eager": far(answers[name, batch], answers[eager])
                if eager in answers
                else None,
                BUSY: mean(busy[name, batch]),
            }
        )
    return {"Tile encoder": rows, **({"Tile encoder, not measured": missing} if missing else {})}


def tile_encoders(
    encoder: TileEncoder, device: str, repositories: Repositories, opened: ExitStack
) -> dict[str, Callable[[], Stream]]:
    """How each runtime is started; Triton serves the first of `repositories` until `opened` closes."""

    def in_triton(repository: Path) -> Stream:
        return partial(through_triton, opened.enter_context(serving(repository, "tiles")))

    def eager(model: Callable[[torch.Tensor], torch.Tensor], autocast: bool = True) -> Stream:
        return partial(map, in_pytorch(model, device, autocast=autocast))

    def in_onnx_runtime(repository: Path) -> Stream:
        return partial(map, partial(run_tiles, session(repository, "tile_encoder", device)))

    runtimes: dict[str, Callable[[], Stream]] = {
        EAGER: partial(eager, encoder),
        "PyTorch eager, half": lambda: eager(copy.deepcopy(encoder).to(half(device)), autocast=False),
    }
    if device == "cuda":
        runtimes["torch.compile, autocast"] = lambda: eager(torch.compile(encoder, dynamic=False))
    for precision, repository in repositories.items():
        runtimes[f"ONNX Runtime, {precision}"] = partial(in_onnx_runtime, repository)
    for precision, repository in islice(repositories.items(), 1):
        runtimes[f"Triton, {precision}"] = partial(in_triton, repository)
    return runtimes


def prepare(make: Callable[[], Stream], batches: Iterable[Tiles]) -> tuple[Stream, list[Embeddings]]:
    """A runtime that is started and warm for each of `batches`, and what it answers to them."""
    stream = make()
    return stream, [list(stream([tiles] * 3))[-1] for tiles in batches]


def slide_encoder(plan: Plan, repositories: Repositories) -> Tables:
    """Milliseconds for one slide: PyTorch and bare ONNX Runtime sessions, alternately."""
    model = slide_model(plan)
    sessions = {name: session(path, "slide_encoder", plan.device) for name, path in repositories.items()}
    rows: list[Row] = []
    for tiles in plan.slides:
        inputs = slide(plan, tiles)
        work: dict[str, Callable[[], Embeddings]] = {
            "PyTorch, fp32": partial(slide_in_pytorch, model, inputs, plan.device, autocast=False),
            "PyTorch, autocast": partial(slide_in_pytorch, model, inputs, plan.device, autocast=True),
            **{f"ONNX Runtime, {name}": partial(run_slide, one, inputs) for name, one in sessions.items()},
        }
        for name, found in compare(plan, work).items():
            rows.append({"tiles": tiles, "runtime": name, "ms": 1e3 * found.seconds, **found.columns})
    return {"Slide encoder": rows}


def occlusion(plan: Plan, repositories: Repositories) -> Tables:
    """Masks/s over one slide: PyTorch mask by mask, and bare ONNX Runtime sessions, alternately."""
    model = slide_model(plan)
    sessions = {
        PRECISIONS[name]: session(path, "slide_occlusion", plan.device) for name, path in repositories.items()
    }
    limit = min(
        (contract_of(path).occlusion.max_mask_tokens for path in repositories.values()), default=10**9
    )
    rows: list[Row] = []
    for tiles, wanted in plan.masks:
        masks = max(1, min(wanted, limit // (tiles + 1)))
        for share in KEPT:
            inputs = slide(plan, tiles)
            keep = np.random.default_rng(0).random((masks, tiles)) < share
            keep[:, 0] = True
            some = keep[:4]
            work: dict[str, Callable[[], Embeddings]] = {
                "PyTorch, fp32, mask by mask": partial(masks_in_pytorch, model, inputs, plan.device, some)
            }
            for name, one in sessions.items():
                work[f"ONNX Runtime, {name}"] = partial(run_slide, one, {**inputs, "KEEP": keep})
            for name, found in compare(plan, work).items():
                count = len(some) if name.startswith("PyTorch") else masks
                row: Row = {"tiles": tiles, "masks": masks, "kept": share, "runtime": name}
                rows.append({**row, "masks/s": count / found.seconds, **found.columns})
    return {"Occlusion": rows}


def served(plan: Plan, repositories: Repositories) -> Tables:
    """`client verify` in every precision, and `client score` of a whole slide in the first."""
    verified: list[Row] = []
    scored: list[Row] = []
    for precision, repository in repositories.items():
        with serving(repository, f"served-{precision}") as connection:
            contract = read_contract(connection)
            path = repository / "slide_pipeline" / str(contract.version) / "reference.npz"
            rows = list(verify(connection, *load_reference(path, contract), contract))
            verified.append(
                {
                    "precision": precision,
                    "occlusion": contract.occlusion.precision,
                    "rows": len(rows),
                    "passed": sum(row.passed for row in rows),
                    "worst max-abs": max(row.max_abs for row in rows),
                    "worst relative": max(row.max_relative for row in rows),
                    "worst 1 - cosine": 1 - min(row.min_cosine for row in rows),
                }
            )
            if not scored:
                scored = [score(plan, connection, contract, n) for n in sorted({max(1, CORES // 2), CORES})]
    tables = {"`client verify`": verified, f"`client score` of {plan.scored:,} tiles": scored}
    return {title: rows for title, rows in tables.items() if rows}


def score(plan: Plan, connection: Connection, contract: Contract, workers: int) -> Row:
    """A whole slide, from its file to the outputs."""
    path = slide_of(plan.scored)
    with tempfile.TemporaryDirectory() as out:
        throughput = Throughput(workers, in_flight=IN_FLIGHT)
        job = BatchJob(Path(out), connection.endpoint, contract, TilingOptions(tissue=False), throughput)
        record = process_slide(job, SlideSource(path, "warm"), connection)
        work, busy = watched(
            lambda: seconds_of(lambda: process_slide(job, SlideSource(path, "slide"), connection)),
            plan.device,
        )
        seconds = work()
    if (record.status, record.tiles) != (OK, plan.scored):
        raise ExportError(f"the slide was not scored: {record.status}, {record.tiles} tiles, {record.reason}")
    return {
        "precision": contract.precision,
        "reader threads": workers,
        "seconds": seconds,
        "tiles/s": plan.scored / seconds,
        "bottleneck": bottleneck(record.stages).removeprefix("bottleneck: ").partition(":")[0],
        BUSY: mean(busy),
    }


SECTIONS: dict[str, tuple[Callable[[Plan, Repositories], Tables], tuple[str, ...]]] = {
    "matrix-product": (matrix_product, ()),
    "tile-encoder": (tile_encoder, tuple(PRECISIONS)),
    "slide-encoder": (slide_encoder, ("fp32", "fp16")),
    "occlusion": (occlusion, ("fp32", "fp16")),
    "served": (served, tuple(PRECISIONS)),
}
"""What each section runs, and the precisions that it is given, as far as they could be exported."""


def half(device: str) -> torch.dtype:
    """PyTorch's half precision: float16 as the published pipeline, on a CPU bfloat16."""
    return torch.float16 if device == "cuda" else torch.bfloat16


def in_pytorch(
    model: Callable[[torch.Tensor], torch.Tensor], device: str, *, autocast: bool
) -> Callable[[Tiles], Embeddings]:
    """A PyTorch model, under autocast as the published pipeline runs it, or in its own type."""

    def encode(tiles: Tiles) -> Embeddings:
        with torch.inference_mode(), torch.autocast(device, half(device), enabled=autocast):
            embeddings: Embeddings = model(torch.from_numpy(tiles).to(device)).float().cpu().numpy()
        return embeddings

    return encode


def session(repository: Path, model: str, device: str) -> onnxruntime.InferenceSession:
    """A bare session of a served graph, with TF32 off.

    Raises:
        ExportError: ONNX Runtime cannot use CUDA.
    """
    providers: list[Any] = ["CPUExecutionProvider"]
    if device == "cuda":
        onnxruntime.preload_dlls()
        providers.insert(0, ("CUDAExecutionProvider", CUDA_OPTIONS))
    path = repository / model / str(served_version(repository)) / "model.onnx"
    made = onnxruntime.InferenceSession(path, providers=providers)
    if device == "cuda" and "CUDAExecutionProvider" not in made.get_providers():
        raise ExportError(
            "ONNX Runtime does not use CUDA: uninstall onnxruntime, then "
            ".venv/bin/uv pip install --group server-gpu"
        )
    return made


@contextmanager
def serving(repository: Path, name: str) -> Iterator[Connection]:
    """A connection to a local Triton that serves `repository`."""
    with (
        run_triton(repository, log=FOLDER / f"{name}.log") as server,
        Connection(Endpoint(server.url), in_flight=IN_FLIGHT) as connection,
    ):
        yield connection


def through_triton(connection: Connection, batches: Iterable[Tiles]) -> Iterator[Embeddings]:
    """uint8 tiles over gRPC, a request per batch."""
    requests = ({"TILES": tiles} for tiles in batches)
    for answer in connection.infer_stream("tile_encoder", requests, ["EMBEDDINGS"]):
        yield answer["EMBEDDINGS"]


def rate(stream: Stream, tiles: Tiles, seconds: float) -> float:
    """Tiles/s of a stream of batches that lasts for `seconds`."""
    start = time.perf_counter()

    def batches() -> Iterator[Tiles]:
        while time.perf_counter() - start < seconds:
            yield tiles

    count = sum(len(embeddings) for embeddings in stream(batches()))
    return count / (time.perf_counter() - start)


def watched(work: Callable[[], float], device: str) -> tuple[Callable[[], float], list[int]]:
    """`work`, and NVML's utilisation in percent five times per second while it runs (empty without NVML)."""
    busy: list[int] = []
    if device != "cuda" or importlib.util.find_spec("pynvml") is None:
        return work, busy

    def run() -> float:
        done = threading.Event()

        def sample() -> None:
            while not done.wait(0.2):
                busy.append(torch.cuda.utilization())

        sampler = threading.Thread(target=sample)
        sampler.start()
        try:
            return work()
        finally:
            done.set()
            sampler.join()

    return run, busy


@dataclass(frozen=True)
class Compared:
    """The median trial's seconds, and the columns that all runtimes have."""

    seconds: float
    columns: Row


def compare(plan: Plan, work: Mapping[str, Callable[[], Embeddings]]) -> dict[str, Compared]:
    """Time `work` alternately, after a first run whose results are compared with the first runtime's."""
    found = {name: run() for name, run in work.items()}
    timed = {name: watched(partial(seconds_of, run), plan.device) for name, run in work.items()}
    seconds = alternate({name: run for name, (run, _) in timed.items()}, plan.trials)
    reference = next(iter(found.values()))
    return {
        name: Compared(
            statistics.median(own),
            {
                "1 - cosine to PyTorch": far(found[name][: len(reference)], reference),
                BUSY: mean(timed[name][1]),
            },
        )
        for name, own in seconds.items()
    }


def far(x: Embeddings, y: Embeddings) -> float:
    """1 - the least cosine of two vectors' pairs."""
    a, b = (np.atleast_2d(array).astype(np.float64) for array in (x, y))
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return float(1 - ((a * b).sum(axis=1) / norms).min())


def mean(samples: list[int]) -> float | None:
    """The mean of NVML's samples; None without any."""
    return statistics.fmean(samples) if samples else None


def flops_per_tile(encoder: TileEncoder) -> int:
    """FLOPs of the matrix products and attentions of one tile."""
    # Fused kernels aren't all known to the counter.
    with FlopCounterMode(display=False) as counter, torch.inference_mode(), sdpa_kernel(SDPBackend.MATH):
        device = next(encoder.parameters()).device
        encoder(torch.zeros(1, 224, 224, 3, dtype=torch.uint8, device=device))
    return int(counter.get_total_flops())


def slide_model(plan: Plan) -> SlideModel:
    """The slide encoder that the exports are made of."""
    return build_models(plan.preset).slide_model.to(plan.device)


def slide(plan: Plan, tiles: int) -> Arrays:
    """Random embeddings at seeded positions."""
    width = get_preset(plan.preset).tile.embed_dim
    embeddings = np.random.default_rng(0).standard_normal((tiles, width), np.float32)
    return {"EMBEDDINGS": embeddings, "COORDS": seeded_coords(tiles)}


def slide_in_pytorch(model: SlideModel, inputs: Arrays, device: str, *, autocast: bool) -> Embeddings:
    """The slide's embedding [E], from host to host."""
    embeddings, coords = (torch.from_numpy(array).to(device) for array in inputs.values())
    with torch.inference_mode(), torch.autocast(device, half(device), enabled=autocast):
        found: Embeddings = model(embeddings, coords).slide.float().cpu().numpy()
    return found


def masks_in_pytorch(model: SlideModel, inputs: Arrays, device: str, keep: KeepMask) -> Embeddings:
    """The slide's embedding under each mask, [M, E], in a forward per mask."""
    embeddings, coords = (torch.from_numpy(array).to(device) for array in inputs.values())
    with torch.inference_mode():
        found = [
            model.score(embeddings, coords, torch.from_numpy(row[None]).to(device)).slide for row in keep
        ]
        embedded: Embeddings = torch.cat(found).cpu().numpy()
    return embedded


def run_tiles(one: onnxruntime.InferenceSession, tiles: Tiles) -> Embeddings:
    """A tile encoder's answer."""
    embeddings: Embeddings = one.run(["EMBEDDINGS"], {"TILES": tiles})[0]
    return embeddings


def run_slide(one: onnxruntime.InferenceSession, inputs: Arrays) -> Embeddings:
    """A slide encoder's embedding, with or without masks."""
    found: Embeddings = one.run(["SLIDE"], inputs)[0]
    return found


def contract_of(repository: Path) -> Contract:
    """What a repository serves."""
    folder = repository / "slide_pipeline" / str(served_version(repository))
    return Contract.parse((folder / "contract.json").read_text())


def outcome(future: Future[Any]) -> str | None:
    """Why a process failed, in one line; None if it did not."""
    error = future.exception()
    return None if error is None else f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


def measure(plan: Plan, names: Sequence[str], gpu_memory: int | None) -> tuple[Tables, dict[str, str]]:
    """All tables of the sections `names`, and why the exports and sections that failed did."""
    spawn = multiprocessing.get_context("spawn")
    tables: Tables = {}
    failed: dict[str, str] = {}
    wanted = {precision for name in names for precision in SECTIONS[name][1]}
    with ProcessPoolExecutor(4, mp_context=spawn) as pool, console.status("exporting"):
        made: dict[str, Future[Any]] = {
            f"export {precision}": pool.submit(
                export_into,
                FOLDER / f"{plan.preset}-{precision}",
                plan.preset,
                precision=precision,
                occlusion_precision=PRECISIONS[precision],
                gpu_memory=gpu_memory,
            )
            for precision in PRECISIONS
            if precision in wanted
        }
        if "served" in names:
            made["slide"] = pool.submit(slide_of, plan.scored)
    failed |= {name: reason for name, future in made.items() if (reason := outcome(future))}
    for name in names:
        section, precisions = SECTIONS[name]
        repositories = {
            precision: made[f"export {precision}"].result()
            for precision in precisions
            if f"export {precision}" not in failed
        }
        with ProcessPoolExecutor(1, mp_context=spawn) as pool, console.status(name):
            future = pool.submit(section, plan, repositories)
            reason = outcome(future)
        if reason:
            failed[name] = reason
        else:
            tables |= future.result()
    add_shares(tables)
    return tables, failed


def add_shares(tables: Tables) -> None:
    """Give each rate in TFLOP/s its share of the matrix product's, where that was measured."""
    for row in tables.get("Tile encoder", []):
        peak = tables["Matrix product"][0][TFLOPS] if "Matrix product" in tables else None
        own = row[TFLOPS]
        row["of the peak"] = own / peak if isinstance(own, float) and isinstance(peak, float) else None


def page(about: Mapping[str, str], tables: Tables, failed: Mapping[str, str]) -> str:
    """The page in Markdown."""
    head = f"""# On a GPU

`{about["command"]}` on {about["device"]} ({about["host"]}): `{about["preset"]}`, random weights,
torch {about["torch"]}, ONNX Runtime {about["onnxruntime"]}, TF32 off. It took {about["seconds"]} s. The
runtimes of a table were measured alternately, from host to host. All figures: gpu.json."""
    parts = [head, *(f"**{name} failed**: {reason}" for name, reason in failed.items())]
    for title, rows in tables.items():
        lines = (" | ".join(cell(value) for value in row.values()) for row in rows)
        parts.append(f"## {title}\n\n{table(' | '.join(rows[0]), lines)}")
    return "\n\n".join(parts)


def cell(value: str | int | float | None) -> str:
    """A figure as a page shows it."""
    if isinstance(value, float):
        return f"{value:.1f}" if value >= 100 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else value or ""


def main(
    tiny: Annotated[
        bool, typer.Option("--tiny", help="Try the driver on the CPU, with tiny shapes.")
    ] = False,
    only: Annotated[
        list[str] | None, typer.Option(help=f"One of {', '.join(SECTIONS)}; may be repeated [default: all].")
    ] = None,
    pages: Annotated[
        Path | None, typer.Option(help="Folder of the page.", show_default="docs/benchmarks")
    ] = None,
) -> None:
    """Measure what is served on this machine's GPU, against PyTorch."""
    plan = TINY if tiny else FULL
    unknown = [name for name in only or [] if name not in SECTIONS]
    if unknown:
        raise ExportError(f"no section {unknown[0]!r}: choose from {', '.join(SECTIONS)}")
    device = "the CPU, with tiny shapes: these figures say nothing" if tiny else find_gpu()
    gpu_memory = None if tiny else torch.cuda.get_device_properties(0).total_memory >> 30
    began = time.monotonic()
    tables, failed = measure(plan, only or list(SECTIONS), gpu_memory)
    about = {
        "command": " ".join(
            ["make bench NAME=gpu", *([f'ARGS="{" ".join(sys.argv[1:])}"'] if sys.argv[1:] else [])]
        ),
        "device": device,
        "host": MACHINE,
        "preset": plan.preset,
        "torch": torch.__version__,
        "onnxruntime": onnxruntime.__version__,
        "seconds": f"{time.monotonic() - began:.0f}",
    }
    folder = pages or (FOLDER if tiny else PAGES)
    folder.mkdir(parents=True, exist_ok=True)
    found = {"about": about, "plan": dataclasses.asdict(plan), "failed": failed, "tables": tables}
    (folder / "gpu.json").write_text(json.dumps(found, indent=1) + "\n")
    write_page(folder / "gpu.md", page(about, tables, failed), passed=not failed)


if __name__ == "__main__":
    run_driver(main)
