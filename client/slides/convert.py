"""Convert a plain picture (untiled TIFF, PNG, JPEG) to a tiled pyramidal TIFF with its scale."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import tifffile
from PIL import Image, ImageOps

from gigapath_contract.errors import one_line

from ..arrays import Pixels
from ..errors import MppError, SlideError
from ..files import atomic_path
from .damage import LONGEST_SIDE
from .detect import first_bytes
from .mpp import PLAUSIBLE
from .tiff import DAMAGE, SIGNATURES, all_pages, orientation_of, page_mpp, upright

_TILE, _QUALITY, _SMALLEST = 256, 90, 1024
Image.MAX_IMAGE_PIXELS = None  # `_check_size` has a limit of its own


def convert_picture(source: Path, target: Path, mpp: float | None = None) -> tuple[tuple[float, float], int]:
    """Write a picture as a slide, JPEG tiles of 256 px, each level half as fine.

    Returns its mpp (x, y) and its number of levels. What an orientation tag turns is turned.

    The picture is held in memory: 5 bytes per pixel, while PNG or JPEG is read 10.

    Args:
        source: RGB, RGBA (laid on white) or grey, 8 bits.
        target: the slide; a name that ends with .tif or .tiff.
        mpp: microns per pixel, in place of those of a TIFF's resolution tags.

    Raises:
        SlideError: it can't be read, or is no such picture.
        MppError: neither the file nor `mpp` says its scale.
        OutputError: the slide can't be written.
    """
    pixels, stored = _read(source)
    scale = (mpp, mpp) if mpp else stored
    if scale is None or not all(PLAUSIBLE[0] <= side <= PLAUSIBLE[1] for side in scale):
        raise MppError(f"{source}: no plausible microns per pixel: give --mpp, or a table with a column mpp")
    resolution = (10_000 / scale[0], 10_000 / scale[1])
    levels = 0
    with atomic_path(target) as part, tifffile.TiffWriter(part, bigtiff=pixels.nbytes > 2**31) as file:
        while levels == 0 or max(pixels.shape[:2]) * 2 > _SMALLEST:
            file.write(
                pixels,
                tile=(_TILE, _TILE),
                photometric="rgb",  # of the input; JPEG stores YCbCr
                subsampling=(1, 1),
                compression="jpeg",
                compressionargs={"level": _QUALITY},
                subfiletype=1 if levels else 0,
                resolution=resolution,
                resolutionunit="CENTIMETER",
                metadata=None,
                software=False,
            )
            levels += 1
            height, width = pixels.shape[:2]
            if min(height, width) < 2:
                break
            half = np.asarray(cv2.resize(pixels, (width // 2, height // 2), interpolation=cv2.INTER_AREA))
            resolution = (resolution[0] * half.shape[1] / width, resolution[1] * half.shape[0] / height)
            pixels = half.astype(np.uint8)
    return scale, levels


def _read(source: Path) -> tuple[Pixels, tuple[float, float] | None]:
    """Pixels RGB uint8 [h, w, 3] of the largest page as viewers turn it, and the mpp by a TIFF's tags."""
    scale = None
    try:
        if first_bytes(source).startswith(SIGNATURES):
            with tifffile.TiffFile(source) as file:
                page = max(all_pages(file), key=lambda page: page.imagewidth * page.imagelength)
                _check_size(source, page.imagewidth, page.imagelength)
                turned, scale = orientation_of(page), page_mpp(page)
                image = upright(page.asarray(), turned)
                scale = (scale[1], scale[0]) if scale and turned > 4 else scale
        else:
            with Image.open(source) as stored:
                _check_size(source, *stored.size)
                ImageOps.exif_transpose(stored, in_place=True)
                image = np.asarray(stored if stored.mode in ("L", "RGB", "RGBA") else stored.convert("RGB"))
    except (*DAMAGE, SyntaxError) as error:
        raise SlideError(
            f"{source}: no readable TIFF, PNG or JPEG ({one_line(error)}): check the file"
        ) from error
    if (
        image.dtype != np.uint8
        or image.ndim not in (2, 3)
        or (image.ndim == 3 and image.shape[2] not in (3, 4))
    ):
        shape = "x".join(map(str, image.shape))
        raise SlideError(f"{source}: {shape} of {image.dtype}: save it as RGB with 8 bits per channel")
    if image.ndim == 2:
        return np.repeat(image[..., None], 3, axis=2), scale
    if image.shape[2] == 4:
        opacity = image[..., 3:].astype(np.uint16)
        return ((image[..., :3] * opacity + 255 * (255 - opacity) + 127) // 255).astype(np.uint8), scale
    return np.ascontiguousarray(image), scale


def _check_size(source: Path, width: int, height: int) -> None:
    if max(width, height) > LONGEST_SIDE or width * height > 2**33:
        raise SlideError(
            f"{source}: {width}x{height} px are more than fit into memory: convert it with libvips"
        )
