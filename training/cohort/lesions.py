"""Draw lesions (crowded atypical nuclei) and smears (the same mean stain without nuclei) into tissue.

Both work on stain amounts (haematoxylin, eosin, rest) at 0.5 mpp, before the laboratory's staining, which is
therefore independent of either.
"""

from __future__ import annotations

import cv2
import numpy as np

from training.cohort.stain import FloatImage

NUCLEI = (70, 110)  # in a tile of 128 um
SEMI_AXES_PX = (7.0, 13.0)  # 3.5 to 6.5 um: two to three times the area of the tissue's own nuclei
HAEMATOXYLIN = (1.6, 3.0)  # as the real slide's own nuclei
EOSIN, REST = 0.40, 0.45
RIM_PX = 24  # no nucleus has its centre nearer to the patch's edge
SMEAR_SIGMA_PX = 22.0


def plant_lesion(tissue: FloatImage, rng: np.random.Generator) -> None:
    """Cover `tissue` [H, W, 3], in place, with crowded, large, dark nuclei."""
    haematoxylin, coverage = _nuclei(tissue.shape[:2], rng)
    _cover(tissue, haematoxylin, coverage)


def plant_smear(tissue: FloatImage, rng: np.random.Generator) -> None:
    """Cover `tissue`, in place, with a lesion's stain spread evenly: its mean colour, no nucleus. Benign."""
    haematoxylin, coverage = _nuclei(tissue.shape[:2], rng)
    amount, spread = (blur(each, SMEAR_SIGMA_PX) for each in (haematoxylin * coverage, coverage))
    _cover(tissue, (amount / np.maximum(spread, 1e-6)).astype(np.float32), spread)


def _nuclei(shape: tuple[int, ...], rng: np.random.Generator) -> tuple[FloatImage, FloatImage]:
    """Haematoxylin and coverage (0 to 1), float32 [H, W], of freshly placed nuclei with clumped chromatin."""
    height, width = shape
    shift, one = 4, 16  # OpenCV's fixed-point coordinates: 1/16 px
    amount, coverage = np.full(shape, sum(HAEMATOXYLIN) / 2, np.float32), np.zeros(shape, np.float32)
    for _ in range(rng.integers(*NUCLEI)):
        centre = [round(one * rng.uniform(RIM_PX, side - RIM_PX)) for side in (width, height)]
        axes = [round(one * axis) for axis in rng.uniform(*SEMI_AXES_PX, size=2)]
        angle, haematoxylin = rng.uniform(0, 180), rng.uniform(*HAEMATOXYLIN)
        for image, value in ((amount, haematoxylin), (coverage, 1.0)):
            cv2.ellipse(image, centre, axes, angle, 0, 360, value, thickness=cv2.FILLED, shift=shift)
    grain = blur(rng.standard_normal(shape, dtype=np.float32), 1.5)
    clumped = blur(amount, 1.0) * np.clip(1 + 0.3 * grain / grain.std(), 0.3, 1.7)
    return clumped, blur(coverage, 0.8)


def blur(image: FloatImage, sigma: float) -> FloatImage:
    """`image` float32 [H, W] under a Gaussian of `sigma` px."""
    return np.asarray(cv2.GaussianBlur(image, (0, 0), sigma), np.float32)


def _cover(tissue: FloatImage, haematoxylin: FloatImage, coverage: FloatImage) -> None:
    nucleus = np.stack([haematoxylin, np.full_like(coverage, EOSIN), np.full_like(coverage, REST)], axis=-1)
    tissue += coverage[..., None] * (nucleus - tissue)
