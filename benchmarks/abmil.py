"""A small attention pooling of tiles (ABMIL) whose Shapley values can be computed nearly exactly."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from benchmarks.planted_slides import CohortTiles, PlantedSlide, planted_slide
from client.attribution.methods.scorer import Scores

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]
Bool = NDArray[np.bool_]

STEPS, BAGS = 600, 4
TINY = 1e-6


class Abmil(nn.Module):
    """Gated attention pooling (Ilse et al. 2018) under masks; without tiles, the pooled embedding is 0."""

    def __init__(self, width: int, hidden: int = 32, classes: int = 2) -> None:
        super().__init__()
        self.project = nn.Sequential(nn.Linear(width, hidden), nn.ReLU())
        self.content, self.gate = nn.Linear(hidden, 16), nn.Linear(hidden, 16)
        self.weight = nn.Linear(16, 1)
        self.head = nn.Sequential(nn.Linear(hidden, 16), nn.ReLU(), nn.Linear(16, classes))

    def tiles(self, embeddings: Tensor) -> tuple[Tensor, Tensor]:
        """Tiles [N, D] -> their projections [N, H] and attention before it is normalised [N]."""
        projected = self.project(embeddings)
        gated = torch.tanh(self.content(projected)) * torch.sigmoid(self.gate(projected))
        return projected, torch.exp(self.weight(gated)[:, 0].clamp(-20, 20))

    def forward(self, embeddings: Tensor, keep: Tensor) -> Tensor:
        """Logits [M, C] of the tiles [N, D] under masks [M, N]."""
        projected, attention = self.tiles(embeddings)
        kept = keep.to(projected.dtype) * attention
        logits: Tensor = self.head(kept @ projected / (kept.sum(dim=1, keepdim=True) + TINY))
        return logits


@dataclass(frozen=True, eq=False)
class TrainedAbmil:
    """A trained model with the normalisation of its input."""

    model: Abmil
    mean: Float32
    scale: Float32

    def on(self, slide: PlantedSlide) -> SlideModel:
        """The model on one slide."""
        with torch.inference_mode():
            projected, attention = self.model.tiles(
                torch.from_numpy((slide.embeddings - self.mean) / self.scale)
            )
        return SlideModel(self.model, projected.double().numpy(), attention.double().numpy())


@dataclass(frozen=True, eq=False)
class SlideModel:
    """A model on one slide: projections [N, H] and attention [N] of its tiles are computed once."""

    model: Abmil
    projected: Float64
    attention: Float64

    def __call__(self, keep: Bool) -> Scores:
        """A `Scorer`."""
        kept = keep * self.attention
        logits = self._head(kept @ self.projected, kept.sum(axis=1))
        return Scores(logits.astype(np.float32), np.ones((len(keep), 1), np.float32))

    def shapley(self, orders: int, rng: np.random.Generator) -> Float64:
        """Shapley values [N] of the log-odds of class 1, from random orders of the tiles and the reverses."""
        weighted = self.attention[:, None] * self.projected
        values = np.zeros(len(weighted))
        for _ in range(orders):
            forth = rng.permutation(len(weighted))
            for order in (forth, forth[::-1]):
                sums = np.concatenate([np.zeros((1, weighted.shape[1])), weighted[order].cumsum(axis=0)])
                logits = self._head(sums, np.concatenate([[0], self.attention[order].cumsum()]))
                values[order] += np.diff(logits[:, 1] - logits[:, 0])
        return values / (2 * orders)

    def answered(self, planted: Bool, least: float, rng: np.random.Generator) -> Bool:
        """Planted tiles [N] that raise the log-odds of 50 benign tiles of their slide by at least `least`."""
        benign = rng.permutation(np.flatnonzero(~planted))[:50]
        keep = np.zeros((1 + int(planted.sum()), len(planted)), dtype=bool)
        keep[:, benign] = True
        keep[np.arange(1, len(keep)), np.flatnonzero(planted)] = True
        logits = self(keep).logits.astype(np.float64)
        gain = logits[:, 1] - logits[:, 0]
        found = np.zeros(len(planted), dtype=bool)
        found[np.flatnonzero(planted)] = gain[1:] - gain[0] >= least
        return found

    def _head(self, sums: Float64, weights: Float64) -> Float64:
        with torch.inference_mode():
            pooled = torch.from_numpy(sums / (weights[:, None] + TINY)).float()
            return np.asarray(self.model.head(pooled).numpy(), dtype=np.float64)


def train(tiles: CohortTiles, seed: int = 0, kind: str = "lesion") -> TrainedAbmil:
    """Train on bags of 40 to 600 training tiles, half of them with `kind` tiles, each whole and masked."""
    torch.manual_seed(seed)
    rng = np.random.default_rng([seed, 99])
    mean, scale = tiles.embeddings.mean(axis=0), tiles.embeddings.std(axis=0) + 1e-3
    model = Abmil(tiles.embeddings.shape[1])
    optimiser = torch.optim.Adam(model.parameters(), 2e-3, weight_decay=1e-4)
    for _ in range(STEPS):
        losses = []
        for bag in range(BAGS):
            count, part = int(rng.integers(40, 600)), np.exp(rng.uniform(np.log(0.005), np.log(0.15)))
            slide = planted_slide(tiles, count, max(1, int(count * part)) * (bag % 2), "scattered", rng, kind)
            keep = np.ones((2, count), dtype=bool)
            keep[1] = rng.random(count) < np.exp(rng.uniform(np.log(0.1), 0))
            labels = torch.tensor([int((row & slide.planted).any()) for row in keep])
            embeddings = torch.from_numpy((slide.embeddings - mean) / scale)
            losses.append(nn.functional.cross_entropy(model(embeddings, torch.from_numpy(keep)), labels))
        optimiser.zero_grad()
        torch.stack(losses).mean().backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    return TrainedAbmil(model.eval(), mean, scale)
