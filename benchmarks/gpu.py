"""`make bench-gpu`: the tile encoder in half precision on a GPU, runtime by runtime: docs/benchmarks/gpu.md.

Seeded weights. Every way gets the same uint8 tiles from the host and returns float32 embeddings to it. Rates
are also given as a fraction of the matrix product's peak, measured in the same run.
"""

from __future__ import annotations

import importlib
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import numpy as np
import numpy.typing as npt
import onnxruntime
import torch
import typer
from rich.console import Console
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from export.engines import find_gpu
from export.errors import ExportError
from export.graphs import tile_graph, write_graph
from export.precision import halve
from export.tensorrt_builder import build_engine, tile_profiles
from training.models.build import build_models
from training.models.tile_encoder import TileEncoder

ROOT = Path(__file__).resolve().parent.parent
REPORT = ROOT / "docs" / "benchmarks" / "gpu.md"
MATRIX = 8192

Tiles = npt.NDArray[np.uint8]
Embeddings = npt.NDArray[np.float32]
Encode = Callable[[Tiles], Embeddings]
console = Console()


@dataclass(frozen=True)
class Measured:
    """One way: tiles a second of each round, and its least cosine to eager PyTorch's embeddings."""

    rates: tuple[float, ...]
    cosine: float


def in_pytorch(model: Callable[[torch.Tensor], torch.Tensor], device: str) -> Encode:
    """PyTorch under autocast, as the published pipeline runs it."""
    kind = torch.float16 if device == "cuda" else torch.bfloat16

    def encode(tiles: Tiles) -> Embeddings:
        with torch.inference_mode(), torch.autocast(device, kind):
            embeddings: Embeddings = model(torch.from_numpy(tiles).to(device)).float().cpu().numpy()
        return embeddings

    return encode


def in_onnx_runtime(graph: Path, device: str) -> Encode:
    """ONNX Runtime on CUDA (or the CPU).

    Raises:
        ExportError: this ONNX Runtime has no CUDA.
    """
    provider = "CUDAExecutionProvider" if device == "cuda" else "CPUExecutionProvider"
    if provider not in onnxruntime.get_available_providers():
        raise ExportError(
            "this onnxruntime has no CUDA: uninstall it, then .venv/bin/uv pip install --group server-gpu"
        )
    session = onnxruntime.InferenceSession(graph, providers=[provider])
    return lambda tiles: session.run(["EMBEDDINGS"], {"TILES": tiles})[0]


def in_tensorrt(graph: Path, batch: int, width: int) -> Encode:
    """A TensorRT engine built here and now.

    Raises:
        ExportError: the package is missing, or the graph does not build.
    """
    try:
        trt = importlib.import_module("tensorrt")
    except ImportError:
        raise ExportError("tensorrt is not installed: .venv/bin/uv pip install --group engines") from None
    plan = build_engine(trt, graph, tile_profiles()[-1:]).plan
    engine = trt.Runtime(trt.Logger(trt.Logger.ERROR)).deserialize_cuda_engine(plan)
    context = engine.create_execution_context()
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    context.set_input_shape("TILES", (batch, 224, 224, 3))
    source = torch.empty(batch, 224, 224, 3, dtype=torch.uint8, device="cuda")
    target = torch.empty(batch, width, device="cuda")
    context.set_tensor_address("TILES", source.data_ptr())
    context.set_tensor_address("EMBEDDINGS", target.data_ptr())

    def encode(tiles: Tiles) -> Embeddings:
        with torch.cuda.stream(stream):
            source.copy_(torch.from_numpy(tiles))
            if not context.execute_async_v3(stream.cuda_stream):
                raise ExportError("TensorRT could not run its engine")
            embeddings: Embeddings = target.cpu().numpy()
        return embeddings

    return encode


def matmul_peak(device: str, size: int = MATRIX, rounds: int = 20) -> float:
    """The most floating-point operations a second that a half-precision matrix product reaches here."""
    kind = torch.float16 if device == "cuda" else torch.bfloat16
    a, b = (torch.randn(size, size, device=device, dtype=kind) for _ in range(2))
    best = float("inf")
    for _ in range(rounds):
        began = time.perf_counter()
        (a @ b)[0, 0].item()  # waits for the product
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best


def operations_a_tile(encoder: TileEncoder) -> int:
    """Floating-point operations of the matrix products and attentions of one tile."""
    # Fused kernels aren't all known to the counter.
    with FlopCounterMode(display=False) as counter, torch.inference_mode(), sdpa_kernel(SDPBackend.MATH):
        device = next(encoder.parameters()).device
        encoder(torch.zeros(1, 224, 224, 3, dtype=torch.uint8, device=device))
    return int(counter.get_total_flops())


def measure(ways: Mapping[str, Encode], batch: int, rounds: int, seconds: float) -> dict[str, Measured]:
    """Time all ways in turns, on the same tiles."""
    tiles = np.random.default_rng(0).integers(0, 256, (batch, 224, 224, 3), np.uint8)
    embeddings = {}
    for name, encode in ways.items():
        with console.status(f"warming {name} up"):
            for _ in range(3):
                embeddings[name] = encode(tiles)
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, encode in ways.items():
            count, began = 0, time.perf_counter()
            while (took := time.perf_counter() - began) < seconds:
                encode(tiles)
                count += batch
            rates[name].append(count / took)
    reference = next(iter(embeddings.values()))
    return {name: Measured(tuple(rates[name]), _cosine(embeddings[name], reference)) for name in ways}


def _cosine(x: Embeddings, y: Embeddings) -> float:
    norms = np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1)
    return float(((x * y).sum(axis=1) / norms).min())


def all_ways(
    preset: str, device: str, batch: int, folder: Path
) -> tuple[dict[str, Encode], dict[str, str], int]:
    """Every way that runs here, why the others don't, and the operations a tile takes."""
    encoder = build_models(preset).tile.eval()
    operations = operations_a_tile(encoder)
    graph = folder / "model.onnx"
    half = build_models(preset).tile
    halve(half.vit, widen=False)
    write_graph(tile_graph(half), graph)
    width = half.vit.num_features
    del half
    encoder.to(device)
    makers: dict[str, Callable[[], Encode]] = {
        "PyTorch eager, autocast": lambda: in_pytorch(encoder, device),
        "ONNX Runtime": lambda: in_onnx_runtime(graph, device),
    }
    if device == "cuda":
        compiled = torch.compile(encoder)
        makers["torch.compile, autocast"] = lambda: in_pytorch(compiled, device)
        makers["TensorRT"] = lambda: in_tensorrt(graph, batch, width)
    ways, missing = {}, {}
    for name, make in makers.items():
        with console.status(f"preparing {name}"):
            try:
                ways[name] = make()
            except ExportError as error:
                missing[name] = str(error)
    return ways, missing, operations


def page(
    where: str,
    preset: str,
    batch: int,
    measured: Mapping[str, Measured],
    missing: Mapping[str, str],
    operations: int,
    peak: float,
) -> str:
    """The report in Markdown."""
    lines = [
        "# The tile encoder on a GPU",
        "",
        f"`make bench-gpu` on {where}: `{preset}`, seeded weights, half precision, batches of {batch}, "
        f"from host to host. torch {torch.__version__}, ONNX Runtime {onnxruntime.__version__}.",
        f"The matrix product's peak, measured in the same run ({MATRIX} x {MATRIX}): "
        f"{peak / 1e12:.1f} Tflop/s; a tile takes {operations / 1e9:.1f} Gflop.",
        "",
        "| way | tiles/s | lowest and highest round | to eager | of the peak | least cosine to eager |",
        "|---|---|---|---|---|---|",
    ]
    rates = {name: statistics.median(way.rates) for name, way in measured.items()}
    eager = next(iter(rates.values()))
    for name, way in measured.items():
        lines.append(
            f"| {name} | {rates[name]:.1f} | {min(way.rates):.1f} to {max(way.rates):.1f} "
            f"| {rates[name] / eager:.2f} | {rates[name] * operations / peak:.1%} | {way.cosine:.6f} |"
        )
    lines += [f"| {name} | not run: {why} | | | | |" for name, why in missing.items()]
    return "\n".join([*lines, ""])


def bench(
    preset: Annotated[str, typer.Option(help="Which tile encoder.")] = "gigapath",
    batch: Annotated[int, typer.Option(help="Tiles a batch.")] = 64,
    rounds: Annotated[int, typer.Option(help="Rounds; all ways take turns.")] = 5,
    seconds: Annotated[float, typer.Option(help="A way's time a round.")] = 10,
) -> None:
    """Measure tiles/s of every runtime on this machine's GPU and write the table."""
    try:
        where = find_gpu()
        with TemporaryDirectory() as folder:
            ways, missing, operations = all_ways(preset, "cuda", batch, Path(folder))
            peak = matmul_peak("cuda")
            measured = measure(ways, batch, rounds, seconds)
    except ExportError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(1)
    table = page(where, preset, batch, measured, missing, operations, peak)
    REPORT.write_text(table)
    console.print(table, markup=False)


if __name__ == "__main__":
    typer.run(bench)
