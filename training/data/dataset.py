"""Slides as a PyTorch dataset, one bag per item, in an order that depends on the seed and the epoch alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from gigapath_contract.coordinates import CoordinateRule
from training.config import DataSection, MaskSection
from training.data.h5_features import read_bag
from training.data.tables import LabelledSlide


class SlideSample(NamedTuple):
    """One slide: features f32 [N, D], coords i64 [N, 2], target, masks bool [M, N] (the first keeps all)."""

    features: Tensor
    coords: Tensor
    target: Tensor
    keep: Tensor


class SlideBags(Dataset[SlideSample]):
    """The bags of some slides, indexed by (epoch, slide): shuffling and masks differ by epoch."""

    def __init__(
        self,
        slides: Sequence[LabelledSlide],
        data: DataSection,
        rule: CoordinateRule,
        *,
        seed: int,
        training: bool,
        masks: MaskSection,
    ) -> None:
        self.slides = slides
        self.data = data
        self.rule = rule
        self.seed = seed
        self.shuffle = data.shuffle_tiles == "always" or (training and data.shuffle_tiles == "train")
        self.masks = masks if training else masks.model_copy(update={"count": 0})

    def __getitem__(self, key: tuple[int, int]) -> SlideSample:
        epoch, index = key
        slide = self.slides[index]
        rng = np.random.default_rng([self.seed, epoch, index])
        bag = read_bag(Path(self.data.features, f"{slide.slide_id}.h5"), self.rule)
        order = rng.permutation(len(bag.features)) if self.shuffle else np.arange(len(bag.features))
        order = order[: self.data.max_tiles]
        features, coords = bag.features[order], bag.coords[order]
        return SlideSample(
            torch.from_numpy(features),
            torch.from_numpy(coords),
            torch.tensor(slide.target),
            torch.from_numpy(draw_masks(coords, self.masks, rng)),
        )


def draw_masks(
    coords: npt.NDArray[np.int64], masks: MaskSection, rng: np.random.Generator
) -> npt.NDArray[np.bool_]:
    """Masks bool [1 + count, N]: the whole slide, then random squares of tiles that are kept or left out."""
    keep = np.ones((1 + masks.count, len(coords)), bool)
    steps = np.diff(np.unique(coords[:, 0]))
    step = int(steps.min()) if len(steps) else 1
    for row in keep[1:]:
        regions = coords // (step * int(rng.choice(masks.regions)))
        _, region = np.unique(regions, axis=0, return_inverse=True)
        kept = rng.random(region.max() + 1) < rng.uniform(*masks.keep)
        row[:] = kept[region.ravel()]
        row[rng.integers(len(row))] = True
    return keep


class EpochOrder(Sampler[tuple[int, int]]):
    """(epoch, slide) in a random order by seed and epoch; process `rank` takes every `world`-th pair.

    The order is repeated from its beginning until all processes have the same number of slides.
    """

    def __init__(self, size: int, *, seed: int, rank: int = 0, world: int = 1) -> None:
        self.size, self.seed, self.rank, self.world = size, seed, rank, world
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning at the start of each epoch, and on resuming."""
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-self.size // self.world)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.size)
        filled = np.resize(order, len(self) * self.world)
        return iter([(self.epoch, int(index)) for index in filled[self.rank :: self.world]])
