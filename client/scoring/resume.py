"""Append-only file of tile embeddings, used to resume an interrupted slide.

The first line is JSON (what the rows belong to). Records follow, appended in the tiles' order, each with a
checksum. A record that a kill or a power failure cut off is dropped on opening, with all that follows it.
"""

from __future__ import annotations

import json
import os
import struct
import time
import zlib
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from ..arrays import Bool, Float32
from ..files import output_errors

_RECORD = struct.Struct("<II")  # rows, CRC-32 of what follows
_SYNC_EVERY_S = 10.0


class EmbeddingCheckpoint:
    """The rows of one slide, [n, D] float32 and [n] valid, in a file that only grows.

    `fingerprint` is anything JSON-able that decides the rows; a file with another fingerprint is overwritten.

    Raises:
        OutputError: the file cannot be written.
    """

    def __init__(self, path: Path, fingerprint: object, dim: int) -> None:
        self._path = path
        self._dim = dim
        header = json.dumps({"fingerprint": fingerprint, "dim": dim}, sort_keys=True).encode() + b"\n"
        with output_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            # Unbuffered: closing has nothing left to write where the disk is full.
            self._file = path.open("r+b" if path.exists() else "w+b", buffering=0)
            self.embeddings, self.valid, end = self._read(header)
            self._file.truncate(end)
            self._file.seek(0 if end == 0 else end)
            if end == 0:
                self._write(header)
        self._synced = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def append(self, embeddings: Float32, valid: Bool) -> None:
        """Add rows [n, D] and [n]; they survive a kill at once, a power failure after some seconds.

        Raises:
            OutputError: the disk is full or gone.
        """
        payload = valid.tobytes() + np.ascontiguousarray(embeddings, np.float32).tobytes()
        with output_errors(self._path):
            self._write(_RECORD.pack(len(valid), zlib.crc32(payload)) + payload)
            if time.monotonic() - self._synced > _SYNC_EVERY_S:
                os.fsync(self._file.fileno())
                self._synced = time.monotonic()

    def _write(self, data: bytes) -> None:
        rest = memoryview(data)
        while rest:  # a full disk takes a part first and raises at the next call
            rest = rest[self._file.write(rest) :]

    def _read(self, header: bytes) -> tuple[Float32, Bool, int]:
        """The complete rows, and the offset behind the last of them (0: not even the header)."""
        embeddings, valid = [np.empty((0, self._dim), np.float32)], [np.empty(0, np.bool_)]
        end = 0
        if self._file.readline(len(header)) == header:
            end, length = len(header), self._path.stat().st_size
            while len(head := self._file.read(_RECORD.size)) == _RECORD.size:
                rows, checksum = _RECORD.unpack(head)
                size = rows * (1 + 4 * self._dim)
                # A damaged count may claim terabytes, which would be allocated before they are missed.
                payload = self._file.read(min(size, length))
                # No rows: the zeros that a power failure leaves at a file's end, of which 0 is the checksum.
                if not rows or len(payload) < size or zlib.crc32(payload) != checksum:
                    break
                valid.append(np.frombuffer(payload, np.bool_, rows))
                embeddings.append(np.frombuffer(payload, np.float32, offset=rows).reshape(rows, self._dim))
                end += _RECORD.size + size
        return np.concatenate(embeddings), np.concatenate(valid), end
