"""Write a pyramidal, tiled JPEG TIFF that OpenSlide, QuPath and tifffile read."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
import tifffile


def write_pyramid(
    path: Path, pixels: npt.NDArray[np.uint8], mpp: float, *, tile_px: int = 256, quality: int = 85
) -> None:
    """Write RGB `pixels` uint8 [H, W, 3] at `mpp` micrometres a pixel, with levels of half the size each.

    The scale stands in the TIFF's resolution tags, where OpenSlide looks for it. The bytes depend on the
    arguments alone. Levels go down until one fits into a single tile.
    """
    level, downsample = pixels, 1
    with tifffile.TiffWriter(path) as tiff:
        while downsample == 1 or max(level.shape) > tile_px:
            if downsample > 1:
                size = ((level.shape[1] + 1) // 2, (level.shape[0] + 1) // 2)
                level = np.asarray(cv2.resize(level, size, interpolation=cv2.INTER_AREA), np.uint8)
            resolution = 1e4 / (mpp * downsample)
            tiff.write(
                level,
                photometric="rgb",
                compression="jpeg",
                compressionargs={"level": quality},
                tile=(tile_px, tile_px),
                resolution=(resolution, resolution),
                resolutionunit="CENTIMETER",
                subfiletype=1 if downsample > 1 else 0,
                metadata=None,
                software="gigapath-triton",
            )
            downsample *= 2
