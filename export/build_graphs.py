"""Build one export in a staging folder: PyTorch's answers, three graphs, parity report and contract."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import onnxruntime
import torch

from export.graphs import occlusion_graph, slide_graph, write_graph
from export.half_gate import TrueHalf
from export.occlusion import max_mask_tokens
from export.parity import GATES, Report, compare_all
from export.precision import PRECISIONS, halve
from export.repository import EXPORT_MODEL
from export.samples import SIZES, real_tiles, seeded_basis, seeded_coords, seeded_keep
from export.target import Target
from export.tile_graph import tile_graph
from gigapath_contract.files import file_sha256
from gigapath_contract.reference import Arrays, Reference, SlideReference, seeded_embeddings, write_reference
from gigapath_contract.schema import (
    GRAPHS,
    Contract,
    HeadContract,
    OcclusionContract,
    SlideEncoderContract,
    TileContract,
    TileEncoderContract,
    VariantContract,
)
from training.models.build import Models
from training.models.head import ClassificationHead
from training.models.slide_model import SlideModel
from training.models.weights import weights_digest


def build(
    models: Models,
    staging: Path,
    *,
    slide: Path,
    precision: str,
    occlusion_precision: str,
    target: Target,
    patch_tokens: bool,
    version: int,
    versions: dict[str, str],
    progress: Callable[[str], None],
) -> tuple[Contract, Report]:
    """Write `<model>/model.onnx`, `parity.json` and `reference.npz` into `staging`.

    `models` is modified and moved to the meta device.
    """
    progress("computing the reference outputs in PyTorch")
    reference = make_reference(models, real_tiles(slide), patch_tokens=patch_tokens)
    contract = _contract(models, precision, occlusion_precision, target, patch_tokens, version, versions)
    precisions = {
        "tile_encoder": precision,
        "slide_encoder": precision,
        "slide_occlusion": occlusion_precision,
    }

    # slide_occlusion shares the encoder and may stay in float32, so it is traced before the conversion.
    halved = False
    for model in sorted(GRAPHS[1:], key=lambda name: precisions[name], reverse=True):
        progress(f"tracing {model}")
        if precisions[model] != "fp32" and not halved:
            halve(models.slide_model.encoder)
            halved = True
        traced = (slide_graph if model == "slide_encoder" else occlusion_graph)(models.slide_model)
        write_graph(traced, staging / model / "model.onnx")
    progress("writing tile_encoder")
    graph = tile_graph(models.tile, PRECISIONS[precision], models.tile_head, patch_tokens=patch_tokens)
    write_graph(graph, staging / "tile_encoder" / "model.onnx")
    # Free the weights before ONNX Runtime loads its own copy.
    models.tile.to("meta")
    models.slide_model.to("meta")

    progress("comparing ONNX Runtime with PyTorch")
    gates = {model: GATES[precisions[model]] for model in GRAPHS}
    rows = compare_all(reference.cases(), Sessions(staging), gates)
    true_half = TrueHalf(staging)
    half = [case for case in reference.cases() if precisions[case.model] != "fp32"]
    if half:
        progress("running what is half precision in true half")
        half = [replace(case, name=f"{case.name}, true half") for case in half]
        rows += compare_all(half, true_half, gates)
    report = Report(precision, gates, rows, tuple(true_half.tensors()))
    contract = replace(contract, export_id=_export_id(contract, staging))
    (staging / EXPORT_MODEL / "parity.json").write_text(report.to_json() + "\n")
    write_reference(staging / EXPORT_MODEL / "reference.npz", reference, contract, gates)
    return contract, report


class Sessions:
    """Runs the graphs of a folder in ONNX Runtime on the CPU, one loaded at a time."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._name = ""
        self._session: onnxruntime.InferenceSession | None = None

    def __call__(self, model: str, inputs: Arrays) -> Arrays:
        """All outputs of `model` by name."""
        if self._session is None or self._name != model:
            self._session = None
            self._session = onnxruntime.InferenceSession(
                self._folder / model / "model.onnx", providers=["CPUExecutionProvider"]
            )
            self._name = model
        names = [output.name for output in self._session.get_outputs()]
        return dict(zip(names, self._session.run(names, inputs), strict=True))


@torch.no_grad()
def make_reference(
    models: Models, tiles: np.ndarray, sizes: tuple[int, ...] = SIZES, *, patch_tokens: bool = False
) -> Reference:
    """PyTorch's float32 answers for real `tiles` and for seeded slides of `sizes` tiles."""
    rows, columns = seeded_basis(models.preset.slide.in_chans)
    pixels = [torch.from_numpy(tile[None]) for tile in tiles]
    embeddings = torch.cat([models.tile(one) for one in pixels])
    outputs = {"EMBEDDINGS": embeddings.numpy()}
    if models.tile_head is not None:
        outputs["TILE_LOGITS"] = models.tile_head(embeddings).numpy()
    if patch_tokens:
        outputs["PATCH_TOKENS"] = torch.cat([models.tile.patch_tokens(one) for one in pixels]).numpy()
    slides = tuple(_slide_reference(models.slide_model, seeded_embeddings(rows, columns, n)) for n in sizes)
    return Reference(tiles, outputs, rows, columns, slides)


def _slide_reference(model: SlideModel, embeddings: np.ndarray) -> SlideReference:
    coords, keep = seeded_coords(len(embeddings)), seeded_keep(len(embeddings))
    inputs = torch.from_numpy(embeddings), torch.from_numpy(coords)
    layers, slide, logits = model(*inputs)
    encoder = {"LAYERS": layers.numpy(), "SLIDE": slide.numpy()}
    masked_logits, masked_slide = model.score(*inputs, torch.from_numpy(keep))
    occlusion = {"SLIDE": masked_slide.numpy()}
    if logits is not None and masked_logits is not None:
        encoder["LOGITS"], occlusion["LOGITS"] = logits.numpy(), masked_logits.numpy()
    return SlideReference(coords, keep, encoder, occlusion)


def _contract(
    models: Models,
    precision: str,
    occlusion_precision: str,
    target: Target,
    patch_tokens: bool,
    version: int,
    versions: dict[str, str],
) -> Contract:
    preset, model = models.preset, models.slide_model
    return Contract(
        export_id="",
        version=version,
        preset=preset.name,
        trained=models.trained,
        tile_encoder=TileEncoderContract(
            preset.tile.name, weights_digest(models.tile.vit.state_dict()), preset.tile.embed_dim
        ),
        slide_encoder=SlideEncoderContract(
            preset.slide.name,
            weights_digest(model.encoder.state_dict()),
            preset.slide.embed_dim,
            preset.slide.depth,
            preset.slide.segment_lengths,
            preset.slide.dilations,
        ),
        head=_head_contract(model.head),
        variant=VariantContract(**asdict(model.variant)),
        precision=precision,
        occlusion=OcclusionContract(
            occlusion_precision, max_mask_tokens(preset.slide, target.occlusion_bytes)
        ),
        versions=versions,
        tile=TileContract(max_batch=target.max_batch),
        tile_head=_head_contract(models.tile_head),
        patch_tokens=preset.tile.tokens if patch_tokens else None,
    )


def _head_contract(head: ClassificationHead | None) -> HeadContract | None:
    if head is None:
        return None
    return HeadContract(weights_digest(head.state_dict()), head.config.classes, head.config.kind)


def _export_id(contract: Contract, staging: Path) -> str:
    """Digest of the graphs' bytes and of the contract without `export_id`, `version` and `versions`."""
    digest = hashlib.sha256()
    for model in GRAPHS:
        for path in sorted((staging / model).iterdir()):
            digest.update(f"{model}/{path.name} {file_sha256(path)}\n".encode())
    fields = json.loads(contract.to_json())
    for name in ("export_id", "version", "versions"):
        del fields[name]
    digest.update(json.dumps(fields, sort_keys=True).encode())
    return digest.hexdigest()[:16]
