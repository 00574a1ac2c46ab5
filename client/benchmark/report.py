"""What a benchmark leaves: a CSV with perf_analyzer's columns, all of it as JSON, and a plot."""

from __future__ import annotations

import csv
import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.table import Table

from gigapath_contract.schema import Contract

from .measure import Point


def describe(
    contracts: Mapping[str, Contract], versions: Mapping[str, str], settings: Mapping[str, Any]
) -> dict[str, Any]:
    """What the figures depend on: each target's export, the servers' versions, this machine, the settings."""
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
    """What this machine's processor calls itself; its architecture where it doesn't say (outside Linux)."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def write_csv(path: Path, points: Sequence[Point]) -> None:
    """One line a point. From `Concurrency` on the columns are perf_analyzer's: times in µs, a request's mean.

    Sending and receiving within this client are part of `Network+Server Send/Recv`, so those two stay empty;
    `Inferences/Second` counts items (rows), as perf_analyzer does with `-b`.
    """
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(
            ["Target", "Kind", "Size", "Unit", "Batch", "Concurrency", "Inferences/Second", "Client Send"]
            + ["Network+Server Send/Recv", "Server Queue", "Server Compute Input", "Server Compute Infer"]
            + ["Server Compute Output", "Client Recv"]
            + [f"p{p} latency" for p in (50, 90, 95, 99)]
        )
        for p in points:
            server = (p.queue_us, p.compute_input_us, p.compute_infer_us, p.compute_output_us)
            # The two means may cover a request more or less; their difference is a time and never negative.
            times = (max(p.mean_us - sum(server), 0.0), *server)
            percentiles = (p.p50_us, p.p90_us, p.p95_us, p.p99_us)
            writer.writerow(
                [p.target, p.kind, p.size, p.unit, f"{p.batch:.2f}", p.concurrency, f"{p.rate:.4g}", ""]
                + [f"{t:.0f}" for t in times]
                + [""]
                + [f"{t:.0f}" for t in percentiles]
            )


def write_json(path: Path, about: dict[str, Any], points: Sequence[Point]) -> None:
    """Everything measured, and what it depends on."""
    path.write_text(json.dumps({**about, "points": [asdict(point) for point in points]}, indent=1) + "\n")


def write_plot(path: Path, points: Sequence[Point]) -> None:
    """Throughput over concurrency, a panel a kind and a line a size; dashed, the bare session."""
    from matplotlib.figure import Figure

    kinds = list(dict.fromkeys(point.kind for point in points))
    figure = Figure((4.5 * len(kinds), 4), layout="constrained")
    for axes, kind in zip(figure.subplots(1, len(kinds), squeeze=False)[0], kinds, strict=True):
        mine = sorted((p for p in points if p.kind == kind), key=lambda p: (p.target, p.size, p.concurrency))
        for (target, size), line in groupby(mine, key=lambda p: (p.target, p.size)):
            values = list(line)
            across = [p.concurrency for p in values]
            (drawn,) = axes.plot(across, [p.rate for p in values], "o-", label=f"{size} tiles, {target}")
            axes.fill_between(
                *(across, [p.spread[0] for p in values], [p.spread[1] for p in values]),
                color=drawn.get_color(),
                alpha=0.15,
            )
            if values[0].bare is not None:
                bare = [p.bare for p in values]
                axes.plot(across, bare, "--", color=drawn.get_color(), label=f"{size} tiles, bare session")
        axes.set(title=kind, xlabel="requests under way", ylabel=f"{mine[0].unit} per second", ylim=(0, None))
        axes.set_xscale("log", base=2)
        axes.set_xticks(sorted({p.concurrency for p in mine}), sorted({p.concurrency for p in mine}))
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=150)


def as_table(points: Sequence[Point]) -> Table:
    """The points for a terminal, times in ms; servers by letters where there are several."""
    letters = {target: chr(ord("A") + i) for i, target in enumerate(dict.fromkeys(p.target for p in points))}
    table = Table(box=None, header_style="bold")
    for heading in ("load", "under\nway", "a\nsecond", "of\nbare", "p50\nms", "p95\nms", "p99\nms"):
        table.add_column(heading, no_wrap=True, justify="left" if heading == "load" else "right")
    for heading in ("queue\nms", "compute\nms", "batch"):
        table.add_column(heading, no_wrap=True, justify="right")
    for p in points:
        times = (p.p50_us, p.p95_us, p.p99_us, p.queue_us, p.compute_infer_us)
        table.add_row(
            f"{letters[p.target] + ' ' if len(letters) > 1 else ''}{p.kind} {p.size}",
            f"{p.concurrency}",
            _short(p.rate),
            f"{p.rate / p.bare:.2f}" if p.bare else "",
            *(_short(t / 1e3) for t in times),
            _short(p.batch),
        )
    if len(letters) > 1:
        table.caption = ", ".join(f"{letter}: {target}" for target, letter in letters.items())
    return table


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def compare(points: Sequence[Point]) -> list[str]:
    """Where two targets were measured: how much faster the second is, at each one's best."""
    lines = []
    for (kind, size), _ in groupby(points, key=lambda p: (p.kind, p.size)):
        best: dict[str, Point] = {}
        for p in points:
            if (p.kind, p.size) == (kind, size) and (p.target not in best or p.rate > best[p.target].rate):
                best[p.target] = p
        if len(best) == 2:
            one, two = best.values()
            lines.append(
                f"{kind}, {size} tiles: {two.target} makes {two.rate / one.rate:.2f} times the {one.unit} of "
                f"{one.target} ({_short(two.rate)} and {_short(one.rate)} a second)"
            )
    return lines


def cost_of_a_slide(points: Sequence[Point], hourly: float, tiles: int) -> list[str]:
    """What one slide of `tiles` tiles costs on each target at `hourly` an hour for all its servers.

    That is its tiles at the best rate and, where `slides` of this size were measured, one of those.
    """
    lines = []
    for target in dict.fromkeys(point.target for point in points):
        mine = [point for point in points if point.target == target]
        rates = [p.rate for p in mine if p.kind == "tiles"]
        slides = [p.rate for p in mine if p.kind == "slides" and p.size == tiles]
        if rates:
            seconds = tiles / max(rates) + (1 / max(slides) if slides else 0)
            cost = hourly * seconds / 3600
            lines.append(
                f"{target}: a slide of {tiles} tiles takes {seconds:.3g} s and costs {cost:.3g}, "
                "all its servers together"
            )
    return lines
