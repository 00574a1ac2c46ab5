"""`make bench-attribution`: leave-one-out over 1,000 tiles, ours against one PyTorch forward a mask."""

from __future__ import annotations

import multiprocessing
import os
import platform
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Annotated

import numpy as np
import psutil
import typer
from numpy.typing import NDArray
from rich.console import Console

from benchmarks.attribution_worker import DefaultMap, Served, default_map, peak_bytes, score_masks
from client.attribution.model.embedded import EmbeddedSlide
from server.local import RunningServer, run_triton

ROOT = Path(__file__).resolve().parent.parent
TOLERANCE = 1e-4
WANTED = {"a": 4.0, "b": 1.3}

console = Console(highlight=False)
Float32 = NDArray[np.float32]
Mask = NDArray[np.bool_]
ScoreOne = Callable[[Mask], Float32]


@dataclass
class Way:
    """One way to score masks: how long each round took and what it returned."""

    name: str
    seconds_a_mask: list[float] = field(default_factory=list)
    logits: dict[int, Float32] = field(default_factory=dict)

    def add(self, masks: range, logits: Float32, seconds: float) -> None:
        self.seconds_a_mask.append(seconds / len(masks))
        self.logits.update(zip(masks, logits, strict=True))


def bench(
    tiles: Annotated[int, typer.Option(help="Tiles, and so masks.")] = 1000,
    rounds: Annotated[int, typer.Option(help="Parts of the work; every part is timed in every way.")] = 20,
    slow_part: Annotated[
        float, typer.Option(help="Part of each round's masks that (a) and (b) score.")
    ] = 1.0,
    repository: Annotated[Path, typer.Option(help="Where the demo model is exported to.")] = ROOT
    / "build"
    / "bench"
    / "attribution",
    out: Annotated[Path, typer.Option(help="The table.")] = ROOT / "docs" / "benchmarks" / "attribution.md",
) -> None:
    """Time (a) plain PyTorch, (b) our PyTorch encoder, (c) our server on the same leave-one-out masks."""
    slide = _slide(tiles)
    _export(repository)
    plain, ours = _in_pytorch(slide)
    ways = {key: Way(key) for key in "abc"}
    log = ROOT / "build" / "log" / "bench-attribution.log"
    spawn = multiprocessing.get_context("spawn")
    with run_triton(repository, log=log) as server, ProcessPoolExecutor(1, mp_context=spawn) as pool:
        before = _server_peak(server)
        pool.submit(score_masks, server.url, slide, _leave_out(range(8), tiles)).result()  # warm
        plain(_leave_out(range(1), tiles)), ours(_leave_out(range(1), tiles))
        served: list[Served] = []
        for part in np.array_split(np.arange(tiles), rounds):
            masks = range(int(part[0]), int(part[-1]) + 1)
            some = masks[:: max(1, round(1 / slow_part))]
            served.append(pool.submit(score_masks, server.url, slide, _leave_out(masks, tiles)).result())
            ways["c"].add(masks, served[-1].logits, served[-1].seconds)
            _time_one_by_one(ways["b"], ours, some, tiles)
            _time_one_by_one(ways["a"], plain, some, tiles)
            console.print(f"masks {masks.start}-{masks.stop - 1}: " + _milliseconds(ways))
        after = _server_peak(server)
        maps = [
            pool.submit(default_map, server.url, slide, checks=checks).result() for checks in (False, True)
        ]
    difference = _largest_difference(ways)
    table = _table(slide, ways, served, maps, difference, before, after)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(table)
    console.print(table, markup=False)
    ratios = _ratios(ways)
    failed = difference > TOLERANCE or any(ratios[key] < wanted for key, wanted in WANTED.items())
    raise typer.Exit(1 if failed else 0)


def _slide(tiles: int) -> EmbeddedSlide:
    rng = np.random.default_rng(0)
    rows, columns = np.divmod(np.arange(tiles), 40)
    return EmbeddedSlide(
        slide_id="bench",
        embeddings=rng.standard_normal((tiles, 96), dtype=np.float32),
        coords=np.stack([columns, rows], axis=1).astype(np.int64) * 256,
        rows=np.arange(tiles),
        total=tiles,
        tile_size=(256, 256),
        step=(256, 256),
        mpp_level0=(0.5, 0.5),
        dimensions=None,
        encoder_sha256=None,
    )


def _leave_out(which: range, tiles: int) -> Mask:
    keep = np.ones((len(which), tiles), dtype=bool)
    keep[np.arange(len(which)), np.array(which)] = False
    return keep


def _export(repository: Path) -> None:
    from export.export import export_preset
    from export.repository import copy_configs

    repository.mkdir(parents=True, exist_ok=True)
    copy_configs(ROOT / "model_repository", repository)
    with console.status("exporting the demo model"):
        export_preset("demo", repository=repository)


def _in_pytorch(slide: EmbeddedSlide) -> tuple[ScoreOne, ScoreOne]:
    """One forward a mask: with plain attention, and with our encoder as it is."""
    import torch

    from benchmarks.plain_longnet import PlainAttention
    from training.models.build import build_models
    from training.models.slide_model import SlideModel

    ours: SlideModel = build_models("demo").slide_model.eval()
    plain = SlideModel(ours.encoder.with_attention(PlainAttention), ours.head, ours.variant).eval()
    embeddings, coords = torch.from_numpy(slide.embeddings), torch.from_numpy(slide.coords)

    @torch.inference_mode()
    def score(model: SlideModel, keep: Mask) -> Float32:
        logits = model(embeddings, coords, torch.from_numpy(keep)).logits
        assert logits is not None
        return np.asarray(logits.numpy())

    return partial(score, plain), partial(score, ours)


def _time_one_by_one(way: Way, score: ScoreOne, masks: range, tiles: int) -> None:
    keep = _leave_out(masks, tiles)
    began = time.perf_counter()
    logits = np.concatenate([score(keep[i : i + 1]) for i in range(len(keep))])
    way.add(masks, logits, time.perf_counter() - began)


def _ratios(ways: dict[str, Way]) -> dict[str, float]:
    """How many times as long a mask takes as through the server, median over rounds."""
    ours = ways["c"].seconds_a_mask
    return {
        key: median(t / c for t, c in zip(ways[key].seconds_a_mask, ours, strict=True)) for key in ("a", "b")
    }


def _milliseconds(ways: dict[str, Way]) -> str:
    return ", ".join(f"({key}) {1000 * way.seconds_a_mask[-1]:.1f} ms" for key, way in ways.items())


def _largest_difference(ways: dict[str, Way]) -> float:
    served = ways["c"].logits
    return max(
        float(np.abs(logits - served[mask]).max())
        for key in ("a", "b")
        for mask, logits in ways[key].logits.items()
    )


def _server_peak(server: RunningServer) -> int:
    """Peak resident bytes so far of the process that holds slide_occlusion's session."""
    processes = psutil.Process(server.pid).children(recursive=True)
    stubs = [process for process in processes if "slide_occlusion" in " ".join(process.cmdline())]
    return max(peak_bytes(stub.pid) for stub in stubs)


def _table(
    slide: EmbeddedSlide,
    ways: dict[str, Way],
    served: list[Served],
    maps: list[DefaultMap],
    difference: float,
    before: int,
    after: int,
) -> str:
    tiles, ratios = len(slide.coords), _ratios(ways)
    sent, requests = sum(one.bytes_sent for one in served), sum(one.requests for one in served)
    naive = tiles * (slide.embeddings.nbytes + slide.coords.nbytes)
    lines = [
        "# Occlusion: one forward a mask against masks through the server",
        "",
        f"Written by `make bench-attribution`. Leave-one-out over {tiles:,} tiles, `demo` slide encoder, "
        f"float32, {os.cpu_count()} CPUs ({platform.machine()}). Every way scores parts of the same masks in "
        f"turn, {len(served)} rounds: a time is the median round's, a ratio the median of the rounds'.",
        "",
        "| way | masks | ms a mask | all masks, s | times (c) | wanted |",
        "|---|---|---|---|---|---|",
    ]
    about = {
        "a": "(a) PyTorch, matmul and softmax, one forward a mask",
        "b": "(b) our PyTorch encoder, one forward a mask",
        "c": "(c) through the server",
    }
    for key, text in about.items():
        way = ways[key]
        each = median(way.seconds_a_mask)
        ratio = f"{ratios[key]:.2f} | >= {WANTED[key]}" if key in ratios else "1 | "
        lines.append(f"| {text} | {len(way.logits)} | {1000 * each:.1f} | {each * tiles:.1f} | {ratio} |")
    plain, checked = maps
    lines += [
        f"| (d) default map, partition_shap | {plain.masks} | {1000 * plain.seconds / plain.forwards:.1f} "
        f"| {plain.seconds:.1f} | | |",
        f"| (d) with its reliability block | {checked.forwards} "
        f"| {1000 * checked.seconds / checked.forwards:.1f} | {checked.seconds:.1f} | | |",
        "",
        f"- Largest difference of a logit between the ways: {difference:.1e} (at most {TOLERANCE:.0e}).",
        f"- Bytes sent by (c): {sent / 1e6:.1f} MB in {requests} requests; one request a mask would send "
        f"{naive / 1e6:.0f} MB. The default map sends {plain.bytes_sent / 1e6:.1f} MB.",
        f"- Peak memory: client {max(one.peak_bytes for one in served) / 2**20:.0f} MiB, the server's "
        f"slide_occlusion {after / 2**20:.0f} MiB ({before / 2**20:.0f} MiB before the first mask).",
        f"- The default map's values sum to the slide's score up to {plain.completeness_gap:.0e}.",
    ]
    if len(ways["a"].logits) < tiles:
        lines.append(
            f"- (a) and (b) scored {len(ways['a'].logits)} of the {tiles} masks, evenly spread; "
            "their time for all masks is that of a mask times the masks."
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    typer.run(bench)
