"""Haematoxylin and eosin: colours to stain amounts and back, to change the staining of tissue.

Optical density is -ln(I / 255); a pixel's density is the sum of its stains' vectors (Beer-Lambert), with the
H and E vectors of Ruifrok and Johnston, "Quantification of histochemical staining by color deconvolution",
Anal Quant Cytol Histol 23 (2001).
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt

FloatImage = npt.NDArray[np.float32]
HAEMATOXYLIN = (0.650, 0.704, 0.286)
EOSIN = (0.072, 0.990, 0.105)


def stain_matrix(rotation: float = 0.0) -> npt.NDArray[np.float64]:
    """[3, 3], rows the unit vectors of haematoxylin, eosin and what is neither (RGB density).

    `rotation` (radians) turns both stains about the grey axis: another manufacturer's dye.
    """
    grey = np.ones(3) / np.sqrt(3)
    turn, _ = cv2.Rodrigues(grey * rotation)
    stains = np.array([HAEMATOXYLIN, EOSIN]) @ turn.T
    rows = np.vstack([stains, np.cross(stains[0], stains[1])])
    return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True), dtype=np.float64)


def unmix(rgb: npt.NDArray[np.uint8]) -> FloatImage:
    """Stain amounts (haematoxylin, eosin, rest) float32 [H, W, 3] of `rgb` uint8 [H, W, 3]."""
    density = -np.log(np.maximum(rgb, 1).astype(np.float32) / 255)
    return np.asarray(density @ np.linalg.inv(stain_matrix()).astype(np.float32))


@dataclass(frozen=True)
class Staining:
    """How one laboratory stains: amounts, the dyes' hue and the glass behind the tissue."""

    haematoxylin: float = 1.0
    eosin: float = 1.0
    rotation: float = 0.0
    glass: tuple[int, int, int] = (243, 243, 243)

    def mix(self, amounts: FloatImage) -> npt.NDArray[np.uint8]:
        """RGB uint8 [H, W, 3] of stain `amounts` float32 [H, W, 3]; where there is none, the glass."""
        scale = np.diag([self.haematoxylin, self.eosin, 1.0])
        density = np.asarray(cv2.transform(amounts, (scale @ stain_matrix(self.rotation)).T))
        light = np.asarray(cv2.exp(-density), np.float32) * np.array(self.glass, np.float32)
        return np.asarray(cv2.convertScaleAbs(light), np.uint8)
