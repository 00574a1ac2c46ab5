"""Write a slide: a tiled, pyramidal JPEG TIFF that OpenSlide, QuPath and tifffile read."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
import tifffile

TILE, QUALITY = 256, 85


def write_pyramid(path: Path, pixels: npt.NDArray[np.uint8], mpp: float) -> None:
    """Write RGB `pixels` uint8 [h, w, 3] of `mpp`, and levels of half the size until one fits into a tile.

    The bytes depend on the arguments alone.
    """
    factor = 1
    with tifffile.TiffWriter(path) as file:
        while True:
            file.write(
                pixels,
                tile=(TILE, TILE),
                photometric="rgb",  # of the input; JPEG stores YCbCr
                subsampling=(2, 2),
                compression="jpeg",
                compressionargs={"level": QUALITY},
                subfiletype=int(factor > 1),
                resolution=(1e4 / (mpp * factor), 1e4 / (mpp * factor)),
                resolutionunit="CENTIMETER",
                metadata=None,
                software="gigapath-triton",
            )
            if max(pixels.shape[:2]) <= TILE:
                return
            factor *= 2
            size = (pixels.shape[1] // 2, pixels.shape[0] // 2)
            pixels = np.asarray(cv2.resize(pixels, size, interpolation=cv2.INTER_AREA), np.uint8)
