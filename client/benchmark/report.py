"""Files of a benchmark (CSV with perf_analyzer's columns, JSON, plot), comparisons and costs."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any

from gigapath_contract.schema import Contract

from .. import files
from .measure import Result

_COLUMNS = (
    "Target,Kind,Tiles per Request,Unit,Batch,Concurrency,Inferences/Second,Client Send,"
    "Network+Server Send/Recv,Server Queue,Server Compute Input,Server Compute Infer,Server Compute Output,"
    "Client Recv,p50 latency,p90 latency,p95 latency,p99 latency"
)


def describe(
    contracts: Mapping[str, Contract], versions: Mapping[str, str], settings: Mapping[str, Any]
) -> dict[str, Any]:
    """What results depend on: each target's export, the servers' versions, this machine, the settings."""
    return {
        "exports": {
            target: {"export_id": c.export_id, "preset": c.preset, "precision": c.precision}
            for target, c in contracts.items()
        },
        "triton": dict(versions),
        "client": {
            "cpu": cpu_name(),
            "cpus": os.cpu_count(),
            "machine": platform.machine(),
            "python": platform.python_version(),
        },
        **settings,
    }


def cpu_name() -> str:
    """This machine's processor, as /proc/cpuinfo names it; its architecture outside Linux."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def write_csv(path: Path, results: Sequence[Result]) -> None:
    """Write one line per result. From `Concurrency` on the columns are perf_analyzer's; times in µs.

    Sending and receiving within this client are part of `Network+Server Send/Recv`, so those two stay empty;
    `Inferences/Second` counts items, as perf_analyzer counts rows with `-b`. Raises OutputError.
    """
    rows = []
    for r in results:
        server = (r.queue_us, r.compute_input_us, r.compute_infer_us, r.compute_output_us)
        # The two means may cover a request more or less; their difference is a time and never negative.
        times = (max(r.mean_us - sum(server), 0.0), *server)
        percentiles = (r.p50_us, r.p90_us, r.p95_us, r.p99_us)
        rows.append(
            [r.target, r.kind, r.tiles_per_request, r.unit, f"{r.batch:.2f}", r.concurrency]
            + [f"{r.rate:.4g}", None]
            + [f"{t:.0f}" for t in times]
            + [None]
            + [f"{t:.0f}" for t in percentiles]
        )
    files.write_csv(path, _COLUMNS.split(","), rows)


def write_json(path: Path, about: dict[str, Any], results: Sequence[Result]) -> None:
    """Write all results and what they depend on (`describe`). Raises OutputError."""
    content = {**about, "results": [asdict(result) for result in results]}
    files.write_text(path, json.dumps(content, indent=1) + "\n")


def write_plot(path: Path, results: Sequence[Result]) -> None:
    """Write a PNG of throughput over concurrency: a panel per kind, a line per size, the baseline dashed.

    Raises OutputError.
    """
    from matplotlib.figure import Figure

    kinds = list(dict.fromkeys(result.kind for result in results))
    figure = Figure((4.5 * len(kinds), 4), layout="constrained")
    for axes, kind in zip(figure.subplots(1, len(kinds), squeeze=False)[0], kinds, strict=True):
        panel = sorted(
            (r for r in results if r.kind == kind),
            key=lambda r: (r.target, r.tiles_per_request, r.concurrency),
        )
        for (target, tiles), group in groupby(panel, key=lambda r: (r.target, r.tiles_per_request)):
            line = list(group)
            across = [r.concurrency for r in line]
            (drawn,) = axes.plot(across, [r.rate for r in line], "o-", label=f"{tiles} tiles, {target}")
            axes.fill_between(
                *(across, [r.spread[0] for r in line], [r.spread[1] for r in line]),
                color=drawn.get_color(),
                alpha=0.15,
            )
            if line[0].baseline is not None:
                baseline = [r.baseline for r in line]
                axes.plot(across, baseline, "--", color=drawn.get_color(), label=f"{tiles} tiles, baseline")
        axes.set(
            title=kind, xlabel="requests in flight", ylabel=f"{panel[0].unit} per second", ylim=(0, None)
        )
        axes.set_xscale("log", base=2)
        axes.set_xticks(sorted({r.concurrency for r in panel}), sorted({r.concurrency for r in panel}))
        axes.legend(fontsize="small")
    with files.atomic_path(path) as part:
        figure.savefig(part, dpi=150, format="png")


def short(value: float) -> str:
    """Three significant digits, or all before the decimal point."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def compare_targets(results: Sequence[Result]) -> list[str]:
    """For every workload that two targets have: the second one's best rate over the first one's, as text."""
    lines = []
    for (kind, tiles), _ in groupby(results, key=lambda r: (r.kind, r.tiles_per_request)):
        best: dict[str, Result] = {}
        for r in results:
            if (r.kind, r.tiles_per_request) != (kind, tiles):
                continue
            if r.target not in best or r.rate > best[r.target].rate:
                best[r.target] = r
        if len(best) == 2:
            one, two = best.values()
            lines.append(
                f"{kind}, {tiles} tiles: {two.target} makes {two.rate / one.rate:.2f} times the {one.unit} "
                f"of {one.target} ({short(two.rate)} and {short(one.rate)} per second)"
            )
    return lines


def cost_per_slide(results: Sequence[Result], hourly: float, tiles: int) -> list[str]:
    """Seconds and cost of one slide of `tiles` tiles on each target, as text with 3 significant digits.

    The seconds are its tiles at the best rate and, where `slides` of this size were measured, one of those.
    hourly: price per hour of all servers of a target; the cost is in the same currency.
    """
    lines = []
    for target in dict.fromkeys(result.target for result in results):
        mine = [result for result in results if result.target == target]
        rates = [r.rate for r in mine if r.kind == "tiles"]
        slides = [r.rate for r in mine if r.kind == "slides" and r.tiles_per_request == tiles]
        if rates:
            seconds = tiles / max(rates) + (1 / max(slides) if slides else 0)
            cost = hourly * seconds / 3600
            lines.append(
                f"{target}: a slide of {tiles} tiles takes {seconds:.3g} s and costs {cost:.3g}, "
                "all its servers together"
            )
    return lines
