"""What `gpu` measures: the models in PyTorch, in bare ONNX Runtime sessions and through Triton."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.common import WORK
from client.triton.connection import Connection
from client.triton.endpoint import Endpoint
from export.errors import ExportError
from export.repository import served_version
from export.samples import seeded_coords
from gigapath_contract.schema import Contract
from server.local import run_triton
from training.models.build import build_slide_model
from training.models.presets import get_preset
from training.models.slide_model import SlideModel
from training.models.tile_encoder import TileEncoder

FOLDER = WORK / "gpu"
IN_FLIGHT = 4
CUDA_OPTIONS = {"use_tf32": "0", "arena_extend_strategy": "kSameAsRequested"}
"""An arena that grows by doubling would keep twice of what the largest slide needs."""
EAGER = "PyTorch eager, autocast"

Tiles = npt.NDArray[np.uint8]
Embeddings = npt.NDArray[np.float32]
Stream = Callable[[Iterable[Tiles]], Iterable[Embeddings]]
"""Embeds batches of tiles, in order."""
Arrays = dict[str, npt.NDArray[Any]]
KeepMask = npt.NDArray[np.bool_]
Repositories = Mapping[str, Path]
"""The model repository of each precision."""


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


def flops_per_tile(encoder: TileEncoder) -> int:
    """FLOPs of the matrix products and attentions of one tile."""
    # Fused kernels aren't all known to the counter.
    with FlopCounterMode(display=False) as counter, torch.inference_mode(), sdpa_kernel(SDPBackend.MATH):
        device = next(encoder.parameters()).device
        encoder(torch.zeros(1, 224, 224, 3, dtype=torch.uint8, device=device))
    return int(counter.get_total_flops())


def slide_model(preset: str, device: str) -> SlideModel:
    """The slide encoder that the exports are made of."""
    return build_slide_model(preset).to(device)


def slide(preset: str, tiles: int) -> Arrays:
    """Random embeddings at seeded positions."""
    width = get_preset(preset).tile.embed_dim
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
