"""What `attribute` shows: a progress bar of masks, and a table of an explanation's figures."""

from __future__ import annotations

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from ..attribution.explain import ExplainProgress, Explanation
from ..attribution.methods.result import Attribution
from ..attribution.render.evidence import sets
from . import options


class MaskProgress(Progress):
    """A bar of an attribution's masks, with the time left by the measured cost of a forward."""

    def __init__(self) -> None:
        super().__init__(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("masks {task.fields[left]}"),
            console=options.console,
            transient=True,
            disable=not options.console.is_terminal,
        )
        self._task = self.add_task("first forward", total=None, left="")

    def show(self, progress: ExplainProgress) -> None:
        """The progress callback of `explain`."""
        left = ""
        if progress.seconds_left is not None and progress.seconds_per_forward is not None:
            minutes, seconds = divmod(round(progress.seconds_left), 60)
            left = f"at {progress.seconds_per_forward * 1000:.3g} ms, {minutes}:{seconds:02} left"
        self.update(
            self._task,
            description=progress.stage,
            completed=progress.done,
            total=progress.planned,
            left=left,
        )


def explanation_line(explanation: Explanation) -> str:
    """The class that is explained, its score, and how many tiles suffice for it and are necessary."""
    result, target = explanation.attribution, explanation.target_index
    found = sets(explanation.evidence) if explanation.evidence else {}
    counts = "".join(
        f"; {name}: {len(tiles)} tile{'s' * (len(tiles) != 1)}" for name, (tiles, _) in found.items()
    )
    return (
        f"{explanation.slide.slide_id}: {explanation.score} of {explanation.target_class} "
        f"{result.full[target]:+.4g}, empty slide {result.base[target]:+.4g}{counts}"
    )


def explanation_table(explanation: Explanation, bytes_sent: int) -> Table:
    """The figures of an explanation and its cost."""
    result, trust, target = explanation.attribution, explanation.reliability, explanation.target_index
    table = Table(show_header=False, box=None)
    table.add_row("method", str(result.method))
    if result.grouping is not None:
        table.add_row("grouped by", ", not ".join(_grouping(one) for one in result.groupings))
    if result.additive:
        table.add_row("completeness gap", f"{result.completeness_gap[target]:.1e}")
    if trust is not None:
        table.add_row("SRG", f"{trust.curves.srg:+.4g}, random up to {max(map(abs, trust.random_srg)):.4g}")
        table.add_row("position sensitivity", f"{trust.position_sensitivity:.2g}")
        table.add_row("noise floor", f"{trust.noise_floor:.2g}")
        table.add_row(f"agreement with {trust.other_occluder}", f"{trust.agreement:+.2f}")
        table.add_row("redundancy", f"{trust.redundancy:.2f}")
        if trust.elsewhere is not None:
            table.add_row("slides of another class", f"{trust.elsewhere:+.4g}")
    cost, dropped = explanation.masked_slide.cost, explanation.masked_slide.dropped_cost
    rate = f"{1000 * cost.per_forward:.3g} ms each" if cost.per_forward else "all from the cache"
    alone = f", {dropped.forwards} of one tile" if dropped.forwards else ""
    table.add_row("forwards", f"{cost.forwards}, {rate}{alone}, {bytes_sent / 1e6:.1f} MB sent")
    return table


def _grouping(result: Attribution) -> str:
    return str(result.grouping) + ("" if result.srg is None else f" (SRG {result.srg:+.4g})")
