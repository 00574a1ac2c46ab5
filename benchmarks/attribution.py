"""Masks through the server: against one PyTorch forward per mask, and against the graph that computes all."""

from __future__ import annotations

import multiprocessing
import shutil
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

from benchmarks.attribution_worker import DefaultMap, Served, default_map, score_masks
from benchmarks.common import (
    MACHINE,
    PAGES,
    WORK,
    Pages,
    alternate,
    console,
    exported,
    fresh_folder,
    median_ratio,
    peak_bytes,
    seconds_of,
    table,
    write_page,
)
from client.attribution.model.embedded import EmbeddedSlide
from client.commands.options import finite
from server.local import RunningServer, run_triton

TOLERANCE = 1e-4
WANTED = {"a": 4.0, "b": 1.3}
RUNTIMES = {
    "a": "(a) PyTorch, matmul and softmax, one forward per mask",
    "b": "(b) our PyTorch encoder, one forward per mask",
    "c": "(c) through the server",
}

HALVES = {56: 64, 1000: 16, 5000: 4}
"""Masks per trial that keep half of so many tiles."""
HALF_WANTED = 4.0
"""How many times as fast they are to be with up to 1,000 tiles, as the graph that computes every tile."""
LARGE = 10_000

Float32 = NDArray[np.float32]
Mask = NDArray[np.bool_]
ScoreOne = Callable[[Mask], Float32]


@dataclass
class Runtime:
    """What scores masks: seconds per mask of each trial, and the logits by mask."""

    seconds_per_mask: list[float] = field(default_factory=list)
    logits: dict[int, Float32] = field(default_factory=dict)

    def add(self, masks: range, logits: Float32, seconds: float) -> None:
        """Book one trial."""
        self.seconds_per_mask.append(seconds / len(masks))
        self.logits.update(zip(masks, logits, strict=True))


def main(
    tiles: Annotated[int, typer.Option(min=1, help="Tiles, and so masks.")] = 1000,
    trials: Annotated[
        int, typer.Option(min=1, help="Parts of the work; every runtime scores every part.")
    ] = 20,
    slow_part: Annotated[
        float, typer.Option(min=0, callback=finite, help="Part of a trial's masks that (a) and (b) score.")
    ] = 0.1,
    pages: Pages = PAGES,
) -> None:
    """Time (a) plain PyTorch, (b) our PyTorch encoder, (c) our server on the same leave-one-out masks; and on
    masks that keep half of a slide our server with the graph that computes every tile, and with ours.
    """
    slide, repository = _slide(tiles), exported("demo")
    plain, ours = _in_pytorch(slide)
    runtimes = {key: Runtime() for key in RUNTIMES}
    served: list[Served] = []
    spawn = multiprocessing.get_context("spawn")
    log = WORK / "attribution.log"
    with (
        run_triton(repository, log=log) as server,
        run_triton(_all_computed(repository), log=log.with_suffix(".all.log")) as slow_server,
        ProcessPoolExecutor(1, mp_context=spawn) as pool,
    ):
        before = _server_peak(server)
        pool.submit(score_masks, server.url, slide, _leave_out(range(8), tiles)).result()  # warm
        plain(_leave_out(range(1), tiles)), ours(_leave_out(range(1), tiles))
        for part in np.array_split(np.arange(tiles), trials):
            masks = range(int(part[0]), int(part[-1]) + 1)
            some = masks[:: max(1, round(1 / slow_part))]
            served.append(pool.submit(score_masks, server.url, slide, _leave_out(masks, tiles)).result())
            runtimes["c"].add(masks, served[-1].logits, served[-1].seconds)
            _time_one_by_one(runtimes["b"], ours, some, tiles)
            _time_one_by_one(runtimes["a"], plain, some, tiles)
            took = (f"({key}) {1000 * one.seconds_per_mask[-1]:.1f} ms" for key, one in runtimes.items())
            console.print(f"masks {masks.start}-{masks.stop - 1}: {', '.join(took)}")
        after = _server_peak(server)
        maps = [
            pool.submit(default_map, server.url, slide, checks=checks).result() for checks in (False, True)
        ]
        large = pool.submit(default_map, server.url, _slide(LARGE), checks=False).result()
        halves = [_time_halves(pool, slow_server.url, server.url, tiles) for tiles in HALVES]
    difference = _largest_difference(runtimes)
    page = _page(slide, runtimes, served, maps, difference, before, after) + _halves_page(halves, large)
    passed = (
        max(difference, *(half.difference for half in halves)) <= TOLERANCE
        and all(_ratio(runtimes, key) >= WANTED[key] for key in WANTED)
        and all(half.ratio >= half.wanted for half in halves)
    )
    write_page(pages / "attribution.md", page, passed=passed)


@dataclass(frozen=True)
class Halves:
    """Seconds per mask of each trial that keeps half of `tiles` tiles: every tile computed, and the kept."""

    tiles: int
    all_computed: list[float]
    kept: list[float]
    difference: float

    @property
    def ratio(self) -> float:
        """The median over trials."""
        return median_ratio(self.all_computed, self.kept)

    @property
    def wanted(self) -> float:
        """The smallest ratio that passes."""
        return HALF_WANTED if self.tiles <= 1000 else 1.0


def _all_computed(repository: Path) -> Path:
    """A copy whose `slide_occlusion` has the one way that computes every tile of every mask."""
    import onnx

    from export.plain import expanded

    copy = fresh_folder(WORK / "repositories" / "all_computed")
    shutil.copytree(repository, copy, dirs_exist_ok=True)
    for graph in (copy / "slide_occlusion").glob("*/model.onnx"):
        onnx.save(expanded(onnx.load(graph)), graph)
    return copy


def _time_halves(pool: ProcessPoolExecutor, slow_url: str, url: str, tiles: int, trials: int = 6) -> Halves:
    """The first trial is not counted."""
    slide, count = _slide(tiles), HALVES[tiles]
    keep = np.random.default_rng(1).random((count, tiles)) < 0.5
    logits: dict[str, Float32] = {}

    def score(url: str) -> float:
        found = pool.submit(score_masks, url, slide, keep).result()
        logits[url] = found.logits
        return found.seconds / count

    seconds = alternate({slow_url: partial(score, slow_url), url: partial(score, url)}, trials)
    difference = float(np.abs(logits[slow_url] - logits[url]).max())
    return Halves(tiles, seconds[slow_url][1:], seconds[url][1:], difference)


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


def _in_pytorch(slide: EmbeddedSlide) -> tuple[ScoreOne, ScoreOne]:
    """One forward per mask: with plain attention, and with our encoder as it is."""
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


def _time_one_by_one(runtime: Runtime, score: ScoreOne, masks: range, tiles: int) -> None:
    keep = _leave_out(masks, tiles)
    logits: list[Float32] = []
    seconds = seconds_of(lambda: logits.extend(score(row[None]) for row in keep))
    runtime.add(masks, np.concatenate(logits), seconds)


def _ratio(runtimes: dict[str, Runtime], key: str) -> float:
    """How many times as long a mask takes as through the server, median over trials."""
    return median_ratio(runtimes[key].seconds_per_mask, runtimes["c"].seconds_per_mask)


def _largest_difference(runtimes: dict[str, Runtime]) -> float:
    served = runtimes["c"].logits
    return max(
        float(np.abs(logits - served[mask]).max())
        for key in WANTED
        for mask, logits in runtimes[key].logits.items()
    )


def _server_peak(server: RunningServer) -> int:
    """Peak resident bytes so far of the process that holds slide_occlusion's session."""
    processes = psutil.Process(server.pid).children(recursive=True)
    stubs = [process for process in processes if "slide_occlusion" in " ".join(process.cmdline())]
    return max(peak_bytes(stub.pid) for stub in stubs)


def _page(
    slide: EmbeddedSlide,
    runtimes: dict[str, Runtime],
    served: list[Served],
    maps: list[DefaultMap],
    difference: float,
    before: int,
    after: int,
) -> str:
    tiles, (plain, checked) = len(slide.coords), maps
    sent, requests = sum(one.bytes_sent for one in served), sum(one.requests for one in served)
    naive = tiles * (slide.embeddings.nbytes + slide.coords.nbytes)
    rows = []
    for key, text in RUNTIMES.items():
        each = median(runtimes[key].seconds_per_mask)
        ratio = f"{_ratio(runtimes, key):.2f} | >= {WANTED[key]}" if key in WANTED else "1 | "
        rows.append(
            f"{text} | {len(runtimes[key].logits)} | {1000 * each:.1f} | {each * tiles:.1f} | {ratio}"
        )
    for text, masks, made in (
        ("(d) default map, partition_shap", plain.masks, plain),
        ("(d) with its reliability block", checked.forwards, checked),
    ):
        each = 1000 * made.seconds / made.forwards
        rows.append(f"{text} | {masks} | {each:.1f} | {made.seconds:.1f} | | ")
    page = f"""# Occlusion: one forward per mask against masks through the server

Written by `make bench NAME=attribution`. Leave-one-out over {tiles:,} tiles, `demo` slide encoder, float32,
{MACHINE}. Every runtime scores parts of the same masks alternately, {len(served)} trials: a time is the
median trial's, a ratio the median of the trials' ratios.

{table("runtime | masks | ms per mask | all masks, s | ratio to (c) | wanted", rows)}

- Largest difference of a logit between the runtimes: {difference:.1e} (at most {TOLERANCE:.0e}).
- Bytes sent by (c): {sent / 1e6:.1f} MB in {requests} requests; one request per mask would send
  {naive / 1e6:.0f} MB. The default map sends {plain.bytes_sent / 1e6:.1f} MB.
- Peak memory: client {max(one.peak_bytes for one in served) / 2**20:.0f} MiB, the server's slide_occlusion
  {after / 2**20:.0f} MiB ({before / 2**20:.0f} MiB before the first mask).
- The default map's values sum to the slide's score up to {plain.completeness_gap:.0e}.
"""
    if len(runtimes["a"].logits) < tiles:
        page += (
            f"- (a) and (b) scored {len(runtimes['a'].logits)} of the {tiles} masks, evenly spread; "
            "their time for all masks is that of one mask times the number of masks.\n"
        )
    return page


def _halves_page(halves: list[Halves], large: DefaultMap) -> str:
    rows = (
        f"{half.tiles:,} | {HALVES[half.tiles]} | {1000 * median(half.all_computed):.2f} | "
        f"{1000 * median(half.kept):.2f} | {half.ratio:.1f} | >= {half.wanted:g} | {half.difference:.0e}"
        for half in halves
    )
    return f"""
## Masks that keep half of the tiles

Through the server, ms per mask: with the graph that computes every tile in every branch (TensorRT gets this
one), and with ours. Alternately, {len(halves[0].kept)} trials; the difference is the largest of a logit.

{table("tiles | masks | every tile | kept tiles | ratio | wanted | difference", rows)}

The default map of {LARGE:,} tiles takes {large.seconds / 60:.1f} minutes ({large.masks} masks).
"""
