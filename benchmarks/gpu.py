"""The tile encoder in half precision on a GPU, runtime by runtime.

Random weights. Every runtime gets the same uint8 tiles from the host and returns float32 embeddings to it.
Rates are also given as a fraction of the matrix product's peak, measured in the same run.
"""

from __future__ import annotations

import importlib
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import numpy as np
import numpy.typing as npt
import onnxruntime
import torch
import typer
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.common import (
    PAGES,
    Pages,
    Trials,
    alternate,
    console,
    median_ratio,
    run_driver,
    seconds_of,
    table,
    write_page,
)
from export.engines import find_gpu
from export.errors import ExportError
from export.graphs import write_graph
from export.precision import PRECISIONS
from export.tensorrt_builder import build_engine, tile_profiles
from export.tile_graph import tile_graph
from training.models.build import build_models
from training.models.tile_encoder import TileEncoder

MATRIX = 8192

Tiles = npt.NDArray[np.uint8]
Embeddings = npt.NDArray[np.float32]
Encode = Callable[[Tiles], Embeddings]


@dataclass(frozen=True)
class EncodingRate:
    """One runtime: tiles/s of each trial, and its least cosine to eager PyTorch's embeddings."""

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
    """A TensorRT engine, built for this GPU.

    Raises:
        ExportError: the package is missing, or the graph does not build.
    """
    try:
        trt = importlib.import_module("tensorrt")
    except ImportError:
        raise ExportError("tensorrt is not installed: .venv/bin/uv pip install --group engines") from None
    plan = build_engine(trt, graph, tile_profiles(batch)[-1:]).plan
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


def matmul_peak(device: str, size: int = MATRIX, trials: int = 20) -> float:
    """The most FLOP/s that a half-precision matrix product reaches here."""
    kind = torch.float16 if device == "cuda" else torch.bfloat16
    a, b = (torch.randn(size, size, device=device, dtype=kind) for _ in range(2))

    def multiply() -> None:
        (a @ b)[0, 0].item()  # waits for the product

    return 2 * size**3 / min(seconds_of(multiply) for _ in range(trials))


def flops_per_tile(encoder: TileEncoder) -> int:
    """FLOPs of the matrix products and attentions of one tile."""
    # Fused kernels aren't all known to the counter.
    with FlopCounterMode(display=False) as counter, torch.inference_mode(), sdpa_kernel(SDPBackend.MATH):
        device = next(encoder.parameters()).device
        encoder(torch.zeros(1, 224, 224, 3, dtype=torch.uint8, device=device))
    return int(counter.get_total_flops())


def measure(
    runtimes: Mapping[str, Encode], batch: int, trials: int, seconds: float
) -> dict[str, EncodingRate]:
    """Time all runtimes alternately, on the same tiles."""
    tiles = np.random.default_rng(0).integers(0, 256, (batch, 224, 224, 3), np.uint8)
    embeddings = {}
    for name, encode in runtimes.items():
        with console.status(f"warming {name} up"):
            for _ in range(3):
                embeddings[name] = encode(tiles)

    def rate(encode: Encode) -> float:
        count, start = 0, time.perf_counter()
        while (took := time.perf_counter() - start) < seconds:
            encode(tiles)
            count += batch
        return count / took

    rates = alternate({name: partial(rate, encode) for name, encode in runtimes.items()}, trials)
    reference = next(iter(embeddings.values()))
    return {name: EncodingRate(tuple(rates[name]), _cosine(embeddings[name], reference)) for name in runtimes}


def _cosine(x: Embeddings, y: Embeddings) -> float:
    norms = np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1)
    return float(((x * y).sum(axis=1) / norms).min())


def all_runtimes(
    preset: str, device: str, batch: int, folder: Path
) -> tuple[dict[str, Encode], dict[str, str], int]:
    """Every runtime that is available here, why the others are not, and the FLOPs of a tile."""
    encoder = build_models(preset).tile.eval()
    flops = flops_per_tile(encoder)
    graphs = {precision: folder / f"{precision}.onnx" for precision in ("fp16", "fp16-mixed")}
    for precision, graph in graphs.items():
        write_graph(tile_graph(encoder, PRECISIONS[precision]), graph)
    width = encoder.vit.num_features
    encoder.to(device)
    makers: dict[str, Callable[[], Encode]] = {
        "PyTorch eager, autocast": lambda: in_pytorch(encoder, device),
        **{
            f"ONNX Runtime, {precision}": partial(in_onnx_runtime, graph, device)
            for precision, graph in graphs.items()
        },
    }
    if device == "cuda":
        compiled = torch.compile(encoder)
        makers["torch.compile, autocast"] = lambda: in_pytorch(compiled, device)
        makers["TensorRT"] = lambda: in_tensorrt(graphs["fp16"], batch, width)
    runtimes, missing = {}, {}
    for name, make in makers.items():
        with console.status(f"preparing {name}"):
            try:
                runtimes[name] = make()
            except ExportError as error:
                missing[name] = str(error)
    return runtimes, missing, flops


def page(
    device: str,
    preset: str,
    batch: int,
    measured: Mapping[str, EncodingRate],
    missing: Mapping[str, str],
    flops: int,
    peak: float,
) -> str:
    """The page in Markdown; `peak` in FLOP/s."""
    eager = next(iter(measured.values())).rates
    rows = []
    for name, one in measured.items():
        rate = statistics.median(one.rates)
        rows.append(
            f"{name} | {rate:.1f} | {min(one.rates):.1f} to {max(one.rates):.1f} "
            f"| {median_ratio(one.rates, eager):.2f} | {rate * flops / peak:.1%} | {one.cosine:.6f}"
        )
    rows += [f"{name} | not run: {why} | | | | " for name, why in missing.items()]
    header = "runtime | tiles/s | lowest and highest trial | ratio to eager | of the peak"
    return f"""# The tile encoder on a GPU

`make bench NAME=gpu` on {device}: `{preset}`, random weights, half precision, batches of {batch}, from host
to host. torch {torch.__version__}, ONNX Runtime {onnxruntime.__version__}. The matrix product's peak in the
same run ({MATRIX} x {MATRIX}) is {peak / 1e12:.1f} TFLOP/s; a tile takes {flops / 1e9:.1f} GFLOP.

{table(f"{header} | least cosine to eager", rows)}
"""


def main(
    preset: Annotated[str, typer.Option(help="Which tile encoder.")] = "gigapath",
    batch: Annotated[int, typer.Option(help="Tiles per batch.")] = 64,
    trials: Trials = 5,
    seconds: Annotated[float, typer.Option(help="Seconds per runtime and trial.")] = 10,
    pages: Pages = PAGES,
) -> None:
    """Measure tiles/s of every runtime on this machine's GPU."""
    device = find_gpu()
    with TemporaryDirectory() as folder:
        runtimes, missing, flops = all_runtimes(preset, "cuda", batch, Path(folder))
        peak = matmul_peak("cuda")
        measured = measure(runtimes, batch, trials, seconds)
    write_page(pages / "gpu.md", page(device, preset, batch, measured, missing, flops, peak))


if __name__ == "__main__":
    run_driver(main)
