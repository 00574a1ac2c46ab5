"""From a slide's embeddings and a server to a map of what drives its score."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import numpy as np

from client.attribution.attribute import Baselines, Method, attribute
from client.attribution.embedded import EmbeddedSlide
from client.attribution.memo import Memo
from client.attribution.result import Attribution
from client.attribution.served import ServedForward
from client.attribution.subject import Subject
from client.attribution.target import HeadKind, Score, Target
from client.connection import Connection
from client.contract import Contract
from client.errors import ClientError

Progress = Callable[[str, int, int], None]
"""Called with what is under way, masks done and masks planned."""


@dataclass(frozen=True, eq=False)
class Settings:
    """What to explain and how; `target` None is the class that the slide scores highest."""

    method: Method = "partition_shap"
    target: str | None = None
    score: Score = "log_odds"
    baselines: Baselines = "mask"
    region: int = 4
    stride: int = 2
    max_evals: int = 512
    n_samples: int = 16
    seed: int = 0


@dataclass(frozen=True, eq=False)
class Explanation:
    """A slide's attribution and what it was made with; `focus` is the target's column of the values."""

    slide: EmbeddedSlide
    contract: Contract
    settings: Settings
    focus: int
    attribution: Attribution

    @property
    def target(self) -> str:
        """The explained class, or `embedding`."""
        return self.attribution.names[self.focus]


def explain(
    slide: EmbeddedSlide,
    connection: Connection,
    contract: Contract,
    settings: Settings | None = None,
    *,
    memo: Memo | None = None,
    progress: Progress = lambda stage, done, total: None,
) -> Explanation:
    """Attribute the slide's score to its tiles through the server's `slide_occlusion`.

    memo: scores kept from an interrupted run, and for the next one.

    Raises:
        ClientError: the embeddings don't fit the served model, no such class, the server; one line.
    """
    settings = settings or Settings()
    slide.check(contract)
    forward = ServedForward(connection, contract, partial(slide.frame, contract))
    subject = Subject(forward, slide.embeddings, slide.coords, model=contract.export_id, memo=memo)
    target, focus = choose_target(subject, contract, settings)
    done = 0

    def count(masks: int) -> None:
        nonlocal done
        done += masks
        progress(settings.method, done, max(done, settings.max_evals))

    attribution = attribute(
        subject,
        target,
        method=settings.method,
        focus=focus,
        baselines=settings.baselines,
        step=slide.step,
        sliding_window_shapes=settings.region,
        strides=settings.stride,
        max_evals=settings.max_evals,
        n_samples=settings.n_samples,
        seed=settings.seed,
        progress_callback=count,
    )
    return Explanation(slide, contract, settings, focus, attribution)


def choose_target(subject: Subject, contract: Contract, settings: Settings) -> tuple[Target, int]:
    """The explained numbers and which of them is the target."""
    scores = subject.masked()(np.ones((1, len(subject.coords)), dtype=bool))
    head = contract.head
    if settings.score == "embedding" or head is None:
        if settings.target is not None:
            raise ClientError(
                "the `embedding` score has no classes: leave the target out"
                if head
                else "the served model has no classification head: only `embedding` can be explained"
            )
        return Target(("embedding",), "embedding", reference=scores.slide[0]), 0
    target = Target(head.classes, settings.score, cast(HeadKind, head.kind))
    if settings.target is None:
        return target, int(scores.logits[0].argmax())
    if settings.target not in head.classes:
        raise ClientError(f"no class {settings.target!r}: the served model knows {', '.join(head.classes)}")
    return target, head.classes.index(settings.target)


def provenance(explanation: Explanation) -> dict[str, Any]:
    """What a reader of the result needs to know of how it was made (JSON-able)."""
    settings, result = explanation.settings, explanation.attribution
    bank = settings.baselines if isinstance(settings.baselines, str) else f"bank {settings.baselines.shape}"
    return {
        "method": result.method,
        "target": explanation.target,
        "score": settings.score,
        "occluder": bank,
        "classes": list(result.names),
        "base": result.base.tolist(),
        "full": result.full.tolist(),
        "evaluations": result.evaluations,
        "additive": result.additive,
        "seed": settings.seed,
        "export_id": explanation.contract.export_id,
        "trained": explanation.contract.trained,
        "embeddings_sha256": explanation.slide.digest,
    }
