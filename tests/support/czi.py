"""Write CZI slides: by Zeiss's own library, then given what it doesn't write, a pyramid and JPEG XR."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

import imagecodecs
import numpy as np
import numpy.typing as npt
from pylibCZIrw import czi

from tests.support.pyramid import shrink

Pixels = npt.NDArray[np.uint8]
TILE = 256
JPEG_XR = 4
# JPEG XR's pixel formats: libCZI knows the second alone.
_RGB, _BGR = (bytes.fromhex("24c3dd6f034efe4bb1853d77768dc9") + end for end in (b"\x0d", b"\x0c"))


def write_czi(
    path: Path,
    pixels: Pixels,
    *,
    origin: tuple[int, int] = (0, 0),
    factors: tuple[int, ...] = (1, 2, 4),
    mpp: float = 0.5,
    jpeg_xr: bool = False,
    compression: str | None = None,
    gaps: frozenset[tuple[int, int]] = frozenset(),
) -> Path:
    """RGB `pixels` uint8 [h, w, 3] as subblocks of 256 px, the first at `origin` (x, y) of the file's frame.

    `factors` are the levels' downsamples; `gaps` are level-0 tiles (column, row) that were not scanned.
    """
    written = []
    with czi.create_czi(str(path), compression_options=compression) as file:
        for factor in factors:
            small = shrink(pixels, factor)
            for y in range(0, small.shape[0], TILE):
                for x in range(0, small.shape[1], TILE):
                    if factor == 1 and (x // TILE, y // TILE) in gaps:
                        continue
                    tile = np.ascontiguousarray(small[y : y + TILE, x : x + TILE, ::-1])
                    file.write(tile, location=(origin[0] + x * factor, origin[1] + y * factor))
                    written.append((tile, factor))
        file.write_metadata("slide", scale_x=mpp * 1e-6, scale_y=mpp * 1e-6)
    content = bytearray(path.read_bytes())
    entries = {name: list(_entries(content, name)) for name in (b"ZISRAWSUBBLOCK", b"ZISRAWDIRECTORY")}
    for found in entries.values():
        for (_, factor), entry in zip(written, found, strict=True):
            for number in range(struct.unpack_from("<i", content, entry + 28)[0]):
                at = entry + 32 + 20 * number
                if chr(content[at]) in "XY":
                    (stored,) = struct.unpack_from("<i", content, at + 16)
                    struct.pack_into("<i", content, at + 8, stored * factor)
            if jpeg_xr:
                struct.pack_into("<i", content, entry + 18, JPEG_XR)
    if jpeg_xr:
        for (tile, _), entry in zip(written, entries[b"ZISRAWSUBBLOCK"], strict=True):
            stream = imagecodecs.jpegxr_encode(
                np.ascontiguousarray(tile[..., ::-1]), level=0.9, photometric="rgb"
            ).replace(_RGB, _BGR)
            (dimensions,) = struct.unpack_from("<i", content, entry + 28)
            (metadata,) = struct.unpack_from("<i", content, entry - 16)
            start = entry - 16 + max(256, 16 + 32 + 20 * dimensions) + metadata
            struct.pack_into("<q", content, entry - 8, len(stream))
            assert len(stream) <= tile.nbytes
            content[start : start + len(stream)] = stream
    path.write_bytes(content)
    return path


def _entries(content: bytearray, name: bytes) -> Iterator[int]:
    """Where the entries of subblocks begin, in their own segments or in the directory."""
    position = 0
    while position < len(content):
        (allocated,) = struct.unpack_from("<q", content, position + 16)
        if content[position : position + 16].rstrip(b"\0") == name:
            if name == b"ZISRAWSUBBLOCK":
                yield position + 48
            else:
                (count,) = struct.unpack_from("<i", content, position + 32)
                at = position + 32 + 128
                for _ in range(count):
                    yield at
                    at += 32 + 20 * struct.unpack_from("<i", content, at + 28)[0]
        position += 32 + allocated
