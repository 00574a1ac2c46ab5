"""Explain a slide: its attribution through a server, and how far to trust it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from gigapath_contract.schema import Contract

from ..errors import ClientError
from .attribute import Settings, attribute, planned_masks, scorer_for
from .curves import descending
from .evidence import Evidence, find_evidence, planned_evidence
from .look_groups import LookGroups, find_look_groups
from .methods.game import CoalitionGame
from .methods.model_outputs import ModelOutputs, Score
from .methods.result import Attribution
from .methods.scorer import Forward
from .model.cache import ScoreCache
from .model.embedded import EmbeddedSlide
from .model.masked_slide import MaskedSlide
from .reliability import Reliability, assess, planned_checks


@dataclass(frozen=True)
class ExplainProgress:
    """Progress of an explanation.

    Attributes:
        stage: the method, `keep_one`, `reliability`, `evidence` or `look groups`.
        done, planned: masks scored, and the largest number of them.
        seconds_per_forward, seconds_left: None until the first forward was measured.
    """

    stage: str
    done: int
    planned: int
    seconds_per_forward: float | None
    seconds_left: float | None


@dataclass(frozen=True, eq=False)
class Explanation:
    """A slide's attribution and what it was made with.

    Attributes:
        slide: the embeddings and where their tiles lie.
        masked_slide: the same under the model, with the scores so far.
        outputs: the explained outputs; `attribution` has a column for each.
        target_index: column of the target.
        keep_one: the scores of the tiles alone, None where they are the attribution.
        evidence: the tiles that suffice for the class and those that it needs; None without checks, for the
            embedding, and where the slide is not called the class.
        reliability: None without checks.
        look_groups: kinds of tissue and what they carry of the target's score, where they were asked for.
    """

    slide: EmbeddedSlide
    contract: Contract
    settings: Settings
    score: Score
    masked_slide: MaskedSlide
    outputs: ModelOutputs
    target_index: int
    attribution: Attribution
    keep_one: Attribution | None
    evidence: Evidence | None
    reliability: Reliability | None
    look_groups: LookGroups | None = None

    @property
    def target_class(self) -> str:
        """The explained class, or `embedding`."""
        return self.attribution.names[self.target_index]

    @property
    def doubt(self) -> str:
        """What is uncertain about the embeddings' origin; empty where nothing is."""
        return self.slide.doubt(self.contract)


def explain(
    slide: EmbeddedSlide,
    forward: Forward,
    contract: Contract,
    settings: Settings | None = None,
    *,
    target: str | None = None,
    score: Score = "log_odds",
    checks: bool = True,
    look_groups: int = 0,
    elsewhere: Callable[[str, float], float | None] = lambda target, full: None,
    cache: ScoreCache | None = None,
    progress: Callable[[ExplainProgress], None] = lambda progress: None,
) -> Explanation:
    """Attribute the slide's score to its tiles.

    forward: the model, `served.ServedForward` for the server's `slide_occlusion`.
    target: a class; None is the one with the highest score.
    checks: measure the reliability too.
    look_groups: number of groups of tiles by look to value as well, at most 32.
    elsewhere: the output of slides that do not show a class, by its name and this slide's own output.
    cache: scores of earlier runs, to which new ones are added.

    Raises:
        ContractMismatch: the embeddings or coordinates do not fit the served model.
        ClientError: no such class, settings that do not fit the slide, or the server fails.
    """
    settings = settings or Settings()
    masked_slide = MaskedSlide.from_embedded(slide, forward, contract, cache)
    outputs, target_index = choose_outputs(masked_slide, contract, target, score)
    alone = replace(settings, method="keep_one", feature_mask=None)
    with_keep_one = settings.method != "keep_one"
    planned: dict[str, int] = {settings.method: planned_masks(masked_slide, settings, slide.step)}
    planned["reliability"] = planned_checks(masked_slide, settings) if checks else 0
    planned["evidence"] = planned_evidence(len(slide.coords)) if checks and score != "embedding" else 0
    if with_keep_one:
        planned["keep_one"] = planned_masks(masked_slide, alone)
    planned["look groups"] = settings.max_evals if look_groups else 0
    done = dict.fromkeys(planned, 0)

    def counter(stage: str) -> Callable[[int], None]:
        def count(masks: int) -> None:
            done[stage] += masks
            progress(_progress(stage, done, planned, masked_slide))

        return count

    attribution = attribute(
        masked_slide,
        outputs,
        settings,
        target_index=target_index,
        step=slide.step,
        progress_callback=counter(settings.method),
    )
    planned[settings.method] = done[settings.method]  # it may have stopped early
    keep_one = evidence = reliability = None
    if with_keep_one:
        keep_one = attribute(masked_slide, outputs, alone, progress_callback=counter("keep_one"))
    if checks:
        reliability = assess(
            masked_slide,
            outputs,
            attribution,
            settings,
            target_index=target_index,
            elsewhere=elsewhere(outputs.names[target_index], float(attribution.full[target_index])),
            progress_callback=counter("reliability"),
        )
    if checks and outputs.score != "embedding":
        tiles = np.arange(len(slide.coords), dtype=np.int64)
        scorer = scorer_for(masked_slide, settings.occluder, settings.seed)
        game = CoalitionGame(scorer, outputs, tiles, progress_callback=counter("evidence"))
        order = descending(np.nan_to_num(attribution.values[:, target_index]), settings.seed)
        evidence = find_evidence(game, order, target_index)
    groups = None
    if look_groups:
        groups = find_look_groups(
            masked_slide,
            outputs,
            settings,
            count=look_groups,
            target_index=target_index,
            progress_callback=counter("look groups"),
        )
    return Explanation(
        slide,
        contract,
        settings,
        score,
        masked_slide,
        outputs,
        target_index,
        attribution,
        keep_one,
        evidence,
        reliability,
        groups,
    )


def _progress(
    stage: str, done: dict[str, int], planned: dict[str, int], masked_slide: MaskedSlide
) -> ExplainProgress:
    per_forward = masked_slide.cost.per_forward
    left = None
    if per_forward is not None:
        # Bags of one tile are short: until one was scored, this is too much.
        costs = {"keep_one": masked_slide.dropped_cost.per_forward or per_forward}
        left = sum(max(0, planned[name] - done[name]) * costs.get(name, per_forward) for name in planned)
    return ExplainProgress(stage, sum(done.values()), sum(planned.values()), per_forward, left)


def choose_outputs(
    masked_slide: MaskedSlide, contract: Contract, target: str | None, score: Score
) -> tuple[ModelOutputs, int]:
    """The outputs to explain and the index of the target among them.

    Raises:
        ClientError: no such class, or a class for the embedding; the model fails.
    """
    scores = masked_slide.in_place()(np.ones((1, len(masked_slide.coords)), dtype=bool))
    head = contract.head
    if head is None and score != "embedding":
        raise ClientError(
            "the served model has no classification head: explain its embedding (--score embedding)"
        )
    if head is None or score == "embedding":
        if target is not None:
            raise ClientError("the embedding has no classes: leave --target out, or choose another --score")
        return ModelOutputs(("embedding",), "embedding", reference=scores.slide[0]), 0
    outputs = ModelOutputs(head.classes, score, head.kind)
    if target is None:
        return outputs, int(scores.logits[0].argmax())
    if target not in head.classes:
        raise ClientError(f"no class {target!r}: the served model knows {', '.join(head.classes)}")
    return outputs, head.classes.index(target)


def provenance(explanation: Explanation) -> dict[str, Any]:
    """How an explanation was made and how far to trust it, for the attributes of its file (JSON-able)."""
    settings, result, trust = explanation.settings, explanation.attribution, explanation.reliability
    occluder = settings.occluder
    about: dict[str, Any] = {
        "target": explanation.target_class,
        "score": explanation.score,
        "occluder": occluder if isinstance(occluder, str) else f"bank of {len(np.atleast_2d(occluder))}",
        "seed": settings.seed,
        "export_id": explanation.contract.export_id,
        "trained": explanation.contract.trained,
        "embeddings_sha256": explanation.slide.digest,
    }
    if explanation.doubt:
        about["embeddings_doubt"] = explanation.doubt
    if result.grouping is not None:
        about["grouping"] = result.grouping
        about |= {f"srg_{one.grouping}": one.srg for one in result.groupings if one.srg is not None}
    if trust is not None and trust.elsewhere is not None:
        about["score_elsewhere"] = trust.elsewhere
    if trust is not None:
        about |= {
            "position_sensitivity": trust.position_sensitivity,
            "noise_floor": trust.noise_floor,
            "other_occluder": trust.other_occluder,
            "agreement": trust.agreement,
            "redundancy": trust.redundancy,
            "srg": trust.curves.srg,
            "random_srg": list(trust.random_srg),
            "beats_random": trust.beats_random,
            "groupings_alike": trust.groupings_alike,
            "curve_fractions": trust.curves.fractions.tolist(),
            "deletion": trust.curves.mif.tolist(),
            "lif": trust.curves.lif.tolist(),
            "insertion": trust.curves.insertion[1].tolist(),
            "warnings": trust.warnings(),
        }
    return about | {
        "unresolved": result.unresolved,
        "completeness_gap": result.completeness_gap.tolist(),
    }
