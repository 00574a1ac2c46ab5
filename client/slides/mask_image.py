"""Read what is drawn in an image: labels, areas, probabilities or an overlay."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import tifffile
from PIL import Image, ImageOps

from gigapath_contract.errors import one_line

from ..arrays import Array, BinaryMask
from ..errors import MaskError
from .detect import first_bytes
from .tiff import DAMAGE, SIGNATURES, all_pages, orientation_of, upright

Image.MAX_IMAGE_PIXELS = None  # `_check_size` has a limit of its own
LARGEST = 1 << 28  # pixels of an image that is decoded as a whole
_CMYK = "in CMYK, whose 0 is white"


def read_mask_image(path: Path, size: tuple[int, int], longest: int) -> BinaryMask:
    """Which pixels of an image are drawn, bool [h, w]: those that are neither 0 nor transparent.

    Of colours, one channel that is not 0 suffices, so that label (1, 0, 0) counts; fractions, such as
    probabilities, count from 0.5 on, and JPEG, which blurs, from half of its largest value on. The stored
    values decide, also in a bilevel TIFF in which 1 is black; of a palette without black, index 0 is 0.

    Args:
        path: PNG, TIFF or whatever Pillow reads; of a pyramid the smallest level that covers `size` is read.
        size: (w, h) that the mask is used at.
        longest: a longer side is shrunk to it, where half of a pixel or more must be drawn.

    Raises:
        MaskError: no readable image, or larger than `LARGEST`.
    """
    try:
        is_tiff = first_bytes(path).startswith(SIGNATURES)
        values, alpha = _read_tiff(path, size) if is_tiff else _read_picture(path)
        if not values.size or values.ndim not in (2, 3):
            raise ValueError(f"it is of shape {values.shape}")
    except (*DAMAGE, SyntaxError) as error:
        raise MaskError(
            f"{path}: no readable mask image ({one_line(error)}): "
            "give a PNG or TIFF of the whole slide, made small"
        ) from None
    drawn: BinaryMask = np.asarray(values >= 0.5 if values.dtype.kind == "f" else values != 0)
    if drawn.ndim == 3:
        drawn = np.asarray(drawn.any(axis=2))
    if alpha is not None:
        drawn = drawn & (alpha > 0)
    factor = longest / max(drawn.shape)
    if factor < 1:
        shape = tuple(max(1, round(side * factor)) for side in drawn.shape[::-1])
        drawn = cv2.resize(drawn.astype(np.uint8) * 255, shape, interpolation=cv2.INTER_AREA) >= 128
    return drawn


def _check_size(width: int, height: int) -> None:
    if width * height > LARGEST:
        raise ValueError(f"{width}x{height} px are too many")


def _read_picture(path: Path) -> tuple[Array, Array | None]:
    with Image.open(path) as stored:
        _check_size(*stored.size)
        if stored.mode == "CMYK":
            raise ValueError(_CMYK)
        image = ImageOps.exif_transpose(stored)  # as viewers show it
        if image.mode in ("P", "PA") or image.has_transparency_data:
            pixels = np.asarray(image.convert("RGBA"))
            indexed = image.mode == "P" and pixels[..., :3].any(axis=2).all()  # QuPath's labels on white
            return np.asarray(image) if indexed else pixels[..., :3], pixels[..., 3]
        pixels = np.asarray(image)
        return _unblurred(pixels) if stored.format in ("JPEG", "MPO") else pixels, None


def _read_tiff(path: Path, size: tuple[int, int]) -> tuple[Array, Array | None]:
    with tifffile.TiffFile(path) as file:
        all_pages(file)  # before `series`, which would never end where the pages do not
        pages = [page.aspage() for level in file.series[0].levels if (page := level.pages[0])]
        enough = [page for page in pages if page.imagewidth >= size[0] and page.imagelength >= size[1]]
        page = min(enough or pages[:1], key=lambda page: page.imagewidth)
        _check_size(page.imagewidth, page.imagelength)
        if page.photometric == tifffile.PHOTOMETRIC.SEPARATED:
            raise ValueError(_CMYK)
        pixels = page.asarray()
        if page.samplesperpixel > 1 and page.planarconfig == tifffile.PLANARCONFIG.SEPARATE:
            pixels = np.moveaxis(pixels, 0, -1)
        pixels = upright(pixels, orientation_of(page))
        if page.compression == tifffile.COMPRESSION.JPEG:
            pixels = _unblurred(pixels)
        alpha = page.extrasamples and page.extrasamples[-1] in (1, 2)
        return (pixels[..., :-1], pixels[..., -1]) if alpha else (pixels, None)


def _unblurred(pixels: Array) -> Array:
    """What JPEG stored as parts of the largest value: 0 next to it becomes a little more than 0."""
    return np.asarray(pixels / pixels.max(initial=1))
