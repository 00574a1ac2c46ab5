"""What an export takes, and how fast and large its graphs are on a CPU.

Every figure is measured in its own process. Weights are the demo's own, and random for the other presets.
"""

from __future__ import annotations

import json
import shutil
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, cast

import numpy as np
import onnx_ir
import onnxruntime
import torch
import typer

from benchmarks.common import (
    MACHINE,
    PAGES,
    REAL_SLIDE,
    ROOT,
    WORK,
    Pages,
    alternate,
    console,
    fresh_folder,
    in_own_process,
    peak_bytes,
    seconds_of,
    table,
    write_page,
)

FOLDER = WORK / "export"
MEASURED = FOLDER / "measured.json"
PRESETS = ["demo", "gigapath-flash", "gigapath"]
PRECISIONS = ["fp32", "fp16", "fp16-mixed"]
TRIALS = 7
BATCHES = {"gigapath": 2}  # of tiles, where the graphs are compared: a tile takes 7 s of one thread

Figures = Mapping[str, float]


def measure_export(preset: str, precision: str) -> Figures:
    """Seconds, peak in GiB, the graphs' size in GiB and the worst parity."""
    from export.export import export_preset
    from export.repository import copy_configs

    repository = fresh_folder(FOLDER / f"{preset}-{precision}")
    copy_configs(ROOT / "model_repository", repository)
    result = export_preset(preset, repository=repository, precision=precision, slide=REAL_SLIDE)
    assert result.report is not None
    files = [path for path in repository.rglob("model.onnx*") if path.is_file()]
    return {
        "seconds": result.seconds,
        "peak": peak_bytes() / 2**30,
        "size": sum(path.stat().st_size for path in files) / 2**30,
        "max_abs": max(row.max_abs for row in result.report.rows),
        "cosine": min(row.min_cosine for row in result.report.rows),
    }


def measure_tile_encoder(graph: Path) -> Figures:
    """Seconds to load a tile encoder and to encode one tile, and the peak in GiB."""
    start = time.perf_counter()
    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    loaded = time.perf_counter()
    (embedding,) = session.run(None, {"TILES": np.full((1, 224, 224, 3), 200, np.uint8)})
    answered = time.perf_counter()
    assert np.isfinite(embedding).all()
    return {"load": loaded - start, "run": answered - loaded, "peak": peak_bytes() / 2**30}


def measure_slide_encoder(graph: Path, tiles: int) -> Figures:
    """Seconds and peak in GiB of a slide encoder, as it is served, on random embeddings of `tiles` tiles."""
    options = onnxruntime.SessionOptions()
    options.enable_cpu_mem_arena = options.enable_mem_pattern = False  # as its config.pbtxt has it
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    width = session.get_inputs()[0].shape[1]
    embeddings = np.random.default_rng(0).standard_normal((tiles, width), np.float32)
    rows, columns = np.divmod(np.arange(tiles), 1000)
    inputs = {"EMBEDDINGS": embeddings, "COORDS": np.stack([columns, rows], axis=1) * 256}
    outputs: list[Any] = []
    seconds = seconds_of(lambda: outputs.extend(session.run(None, inputs)))
    assert all(np.isfinite(output).all() for output in outputs)
    return {"seconds": seconds, "peak": peak_bytes() / 2**30}


def measure_graphs(preset: str) -> Figures:
    """Tiles/s of the tile encoder's graph, and of one that PyTorch's exporter traces, alternately.

    One thread, by the processor time that it uses, on which other processes have the least influence.
    """
    from export.graphs import Graph, write_graph
    from export.precision import PRECISIONS
    from export.tile_graph import tile_graph
    from training.models.build import build_models

    encoder = build_models(preset).tile
    batch = BATCHES.get(preset, 8)
    tiles = np.random.default_rng(0).integers(0, 256, (batch, 224, 224, 3), np.uint8)
    graphs: dict[str, Graph | onnx_ir.Model] = {
        "written": tile_graph(encoder, PRECISIONS["fp32"]),
        "traced": Graph(encoder, {"TILES": torch.from_numpy(tiles)}, ("EMBEDDINGS",), ({0: "B"},)),
    }
    embeddings = {}

    def encoding(name: str, graph: Graph | onnx_ir.Model) -> Callable[[], float]:
        path = fresh_folder(FOLDER / f"{preset}-{name}") / "model.onnx"
        write_graph(graph, path)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

        def encode() -> float:
            start = time.process_time()
            (embeddings[name],) = session.run(None, {"TILES": tiles})
            return len(tiles) / (time.process_time() - start)

        encode()  # warm
        return encode

    rates = alternate({name: encoding(name, graph) for name, graph in graphs.items()}, TRIALS)
    ratios = [own / traced for own, traced in zip(rates["written"], rates["traced"], strict=True)]
    return {name: statistics.median(rate) for name, rate in rates.items()} | {
        "ratio": statistics.median(ratios),
        "lowest": min(ratios),
        "highest": max(ratios),
        "difference": float(np.abs(embeddings["written"] - embeddings["traced"]).max()),
    }


def main(
    presets: Annotated[list[str] | None, typer.Argument(help="Presets [all three].")] = None,
    tiles: Annotated[int, typer.Option(min=1, help="Tiles of the large slide.")] = 100_000,
    resume: Annotated[bool, typer.Option("--resume", help="Keep what an interrupted run measured.")] = False,
    pages: Pages = PAGES,
) -> None:
    """Measure exports in every precision, and the graphs in ONNX Runtime."""
    presets = presets or PRESETS
    known = json.loads(MEASURED.read_text()) if resume and MEASURED.is_file() else {}

    def measure(work: Callable[..., Figures], *arguments: Any) -> Figures:
        about = " ".join([work.__name__, *(str(one).removeprefix(f"{FOLDER}/") for one in arguments)])
        if about not in known:
            with console.status(about):
                known[about] = in_own_process(work, *arguments)
            MEASURED.write_text(json.dumps(known, indent=1))
        console.print(about, known[about], markup=False)
        return cast(Figures, known[about])

    exports, answers = {}, {}
    for key in [(preset, precision) for preset in presets for precision in PRECISIONS]:
        exports[key] = measure(measure_export, *key)
        graph = FOLDER / "-".join(key) / "tile_encoder" / "1" / "model.onnx"
        answers[key] = measure(measure_tile_encoder, graph)
    largest = presets[-1]
    graph = FOLDER / f"{largest}-fp32" / "slide_encoder" / "1" / "model.onnx"
    slides = {count: measure(measure_slide_encoder, graph, count) for count in (1000, 10_000, tiles)}
    graphs = {preset: measure(measure_graphs, preset) for preset in presets}
    shutil.rmtree(FOLDER)
    write_page(pages / "export.md", _page(exports, answers, largest, slides, graphs))


def _page(
    exports: Mapping[tuple[str, str], Figures],
    answers: Mapping[tuple[str, str], Figures],
    largest: str,
    slides: Mapping[int, Figures],
    graphs: Mapping[str, Figures],
) -> str:
    header = "preset | precision | export, s | peak | graphs, GiB | worst max-abs | worst cosine"
    rows = [
        f"{preset} | {precision} | {made['seconds']:.0f} | {made['peak']:.1f} | {made['size']:.2f} "
        f"| {made['max_abs']:.1e} | {made['cosine']:.7f} | {answer['load']:.1f} | {answer['run']:.2f} "
        f"| {answer['peak']:.1f}"
        for ((preset, precision), made), answer in zip(exports.items(), answers.values(), strict=True)
    ]
    slide_rows = (f"{count:,} | {one['seconds']:.1f} | {one['peak']:.2f}" for count, one in slides.items())
    graph_rows = (
        f"{preset} | {one['written']:.2f} | {one['traced']:.2f} | {one['ratio']:.2f} "
        f"| {one['lowest']:.2f} to {one['highest']:.2f} | {one['difference']:.1e}"
        for preset, one in graphs.items()
    )
    return f"""# Export on a CPU

`make bench NAME=export` on {MACHINE}, ONNX Runtime {onnxruntime.__version__}. Each figure is measured in its
own process; peaks are those of whole processes, in GiB. Weights are random for `gigapath` and
`gigapath-flash`.

{table(f"{header} | load tile encoder, s | one tile, s | peak", rows)}

The worst parity row is over all outputs of the three graphs, against PyTorch in float32.

## The slide encoder of `{largest}` in ONNX Runtime, fp32, all outputs

{table("tiles | seconds | peak", slide_rows)}

## The tile encoder's graph, as written for ONNX Runtime and as traced by PyTorch

Tiles/s of one thread in batches of 8 (`gigapath`: 2), measured alternately by processor time, median of
{TRIALS} trials.

{table("preset | written | traced | ratio | all trials | embeddings differ by", graph_rows)}
"""
