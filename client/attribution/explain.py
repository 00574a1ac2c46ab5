"""From a slide's embeddings and a server to a map of what drives its score, and how far to trust it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from gigapath_contract.schema import Contract

from ..errors import ClientError
from .attribute import Settings, attribute, planned_masks
from .methods.result import Attribution
from .methods.scorer import Forward
from .methods.target import Score, Target
from .model.cache import ScoreCache
from .model.embedded import EmbeddedSlide
from .model.masked_slide import MaskedSlide
from .reliability import Reliability, assess, planned_checks

# Bags of one tile are tiny forwards, but one request each: beside the map only where they take no time.
KEEP_ONE_TILES = 2000


@dataclass(frozen=True)
class ExplainProgress:
    """Where an explanation stands: masks asked of how many at most, what one costs, how long the rest takes.

    Both times are None until a forward was measured.
    """

    stage: str
    done: int
    planned: int
    seconds_a_forward: float | None
    seconds_left: float | None


@dataclass(frozen=True, eq=False)
class Explanation:
    """A slide's attribution and what it was made with; `focus` is the target's column of the values
    of `numbers`."""

    slide: EmbeddedSlide
    contract: Contract
    settings: Settings
    score: Score
    focus: int
    subject: MaskedSlide
    numbers: Target
    attribution: Attribution
    keep_one: Attribution | None
    reliability: Reliability | None

    @property
    def target(self) -> str:
        """The explained class, or `embedding`."""
        return self.attribution.names[self.focus]


def explain(
    slide: EmbeddedSlide,
    forward: Forward,
    contract: Contract,
    settings: Settings | None = None,
    *,
    target: str | None = None,
    score: Score = "log_odds",
    checks: bool = True,
    memo: ScoreCache | None = None,
    progress: Callable[[ExplainProgress], None] = lambda pace: None,
) -> Explanation:
    """Attribute the slide's score to its tiles.

    forward: the model, `served.ServedForward` for the server's `slide_occlusion`.
    target: a class name; None is the class that the slide scores highest.
    checks: measure the reliability too.
    memo: scores kept from an interrupted run, and for the next one.

    Raises:
        ClientError: the embeddings don't fit the served model, no such class, the server; one line.
    """
    settings = settings or Settings()
    slide.check(contract)
    subject = MaskedSlide(forward, slide.embeddings, slide.coords, model=contract.export_id, memo=memo)
    numbers, focus = choose_target(subject, contract, target, score)
    alone = replace(settings, method="keep_one", feature_mask=None)
    with_keep_one = settings.method != "keep_one" and len(slide.coords) <= KEEP_ONE_TILES
    planned: dict[str, int] = {settings.method: planned_masks(subject, settings, slide.step)}
    planned["reliability"] = planned_checks(subject, settings) if checks else 0
    planned["keep_one"] = planned_masks(subject, alone) if with_keep_one else planned.get("keep_one", 0)
    stage: str = settings.method
    done = dict.fromkeys(planned, 0)

    def count(masks: int) -> None:
        done[stage] += masks
        each = subject.cost.each
        costs = {"keep_one": subject.bag_cost.each or each}  # bags are short: too much until one was scored
        left = [(planned[name] - done[name], costs.get(name, each)) for name in planned]
        seconds = sum(max(0, masks) * cost for masks, cost in left if cost is not None) if each else None
        progress(ExplainProgress(stage, sum(done.values()), sum(planned.values()), each, seconds))

    result = attribute(subject, numbers, settings, focus=focus, step=slide.step, progress_callback=count)
    planned[stage] = done[stage]  # it may have stopped early
    stage = "keep_one"
    kept = attribute(subject, numbers, alone, focus=focus, progress_callback=count) if with_keep_one else None
    stage = "reliability"
    reliability = (
        assess(subject, numbers, result, settings, focus=focus, progress_callback=count) if checks else None
    )
    return Explanation(
        slide,
        contract,
        settings,
        score,
        focus,
        subject,
        numbers,
        result,
        kept,
        reliability,
    )


def choose_target(
    subject: MaskedSlide, contract: Contract, target: str | None, score: Score
) -> tuple[Target, int]:
    """The explained numbers and which of them is the target."""
    scores = subject.masked()(np.ones((1, len(subject.coords)), dtype=bool))
    head = contract.head
    if head is None and score != "embedding":
        raise ClientError(
            "the served model has no classification head: explain its embedding (--score embedding)"
        )
    if head is None or score == "embedding":
        if target is not None:
            raise ClientError("the embedding has no classes: leave --target out, or choose another --score")
        return Target(("embedding",), "embedding", reference=scores.slide[0]), 0
    numbers = Target(head.classes, score, head.kind)
    if target is None:
        return numbers, int(scores.logits[0].argmax())
    if target not in head.classes:
        raise ClientError(f"no class {target!r}: the served model knows {', '.join(head.classes)}")
    return numbers, head.classes.index(target)


def provenance(explanation: Explanation) -> dict[str, Any]:
    """What a reader of the result needs to know of how it was made (JSON-able)."""
    settings, result, trust = explanation.settings, explanation.attribution, explanation.reliability
    baselines = settings.baselines
    about: dict[str, Any] = {
        "target": explanation.target,
        "score": explanation.score,
        "occluder": baselines if isinstance(baselines, str) else f"bank of {len(np.atleast_2d(baselines))}",
        "seed": settings.seed,
        "export_id": explanation.contract.export_id,
        "trained": explanation.contract.trained,
        "embeddings_sha256": explanation.slide.digest,
    }
    if trust is not None:
        about |= {
            "position_sensitivity": trust.position_sensitivity,
            "noise_floor": trust.noise_floor,
            "other_occluder": trust.other_occluder,
            "agreement": trust.agreement,
            "redundancy": trust.redundancy,
            "srg": trust.curves.gain,
            "random_srg": list(trust.random_gains),
            "beats_random": trust.beats_random,
            "curve_fractions": trust.curves.fractions.tolist(),
            "deletion": trust.curves.most_first.tolist(),
            "least_first": trust.curves.least_first.tolist(),
            "insertion": trust.curves.insertion[1].tolist(),
            "warnings": trust.warnings(),
        }
    return about | {
        "unresolved": result.unresolved,
        "completeness_gap": result.completeness_gap.tolist(),
    }
