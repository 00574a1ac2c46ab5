"""SQLite cache of mask scores; makes attribution resumable."""

from __future__ import annotations

import hashlib
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from ...arrays import Float32, Int64, KeepMask
from ...errors import ClientError
from ...files import make_folder
from ..methods.scorer import Scorer, Scores

Key = bytes


class ScoreCache:
    """Scores by mask in SQLite, in `path` or, without one, in memory; every batch is committed.

    An interrupted run that is started again with the same file scores only the masks that are missing.
    """

    def __init__(self, path: Path | None = None) -> None:
        """Open or make the file.

        Raises:
            ClientError: it can't be opened, or is no such cache; as every method does.
        """
        self._path = path
        with self._one_line_errors():
            self._database = sqlite3.connect(path or ":memory:")
            self._database.execute(
                "CREATE TABLE IF NOT EXISTS scores (key BLOB PRIMARY KEY, logits BLOB, slide BLOB)"
            )

    def get(self, key: Key) -> tuple[bytes, bytes] | None:
        """Logits and slide embedding saved under `key`, as float32 bytes."""
        with self._one_line_errors():
            found: tuple[bytes, bytes] | None = self._database.execute(
                "SELECT logits, slide FROM scores WHERE key = ?", (key,)
            ).fetchone()
        return found

    def put(self, keys: list[Key], scores: Scores) -> None:
        """Save one batch, or nothing of it."""
        rows = zip(keys, scores.logits, scores.slide, strict=True)
        with self._one_line_errors(), self._database:
            self._database.executemany(
                "INSERT OR REPLACE INTO scores VALUES (?, ?, ?)",
                [(key, logits.tobytes(), slide.tobytes()) for key, logits, slide in rows],
            )

    def __enter__(self) -> ScoreCache:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._database.close()

    @contextmanager
    def _one_line_errors(self) -> Iterator[None]:
        """Turn SQLite's errors into one line about the file."""
        try:
            yield
        except sqlite3.OperationalError as error:  # locked, full, not writable
            raise ClientError(
                f"{self._path}: the mask scores can't be used ({error}): stop other runs that use them, free "
                "some space or choose another --out"
            ) from error
        except sqlite3.DatabaseError as error:
            raise ClientError(f"{self._path}: not a cache of mask scores ({error}): delete it") from error


def open_cache(folder: Path, slide_id: str) -> ScoreCache:
    """The cache of one slide, FOLDER/SLIDE-masks.sqlite.

    Raises:
        OutputError: the folder can't be made.
        ClientError: as `ScoreCache` does.
    """
    make_folder(folder)
    return ScoreCache(folder / f"{slide_id}-masks.sqlite")


class CachedScorer:
    """A scorer that passes only masks that are not in `cache` on to `scorer`.

    Attributes:
        forwards, seconds: masks passed on, and how long they took.
    """

    def __init__(self, scorer: Scorer, cache: ScoreCache, key: Key) -> None:
        """`key`: what decides the scores apart from the mask, by `cache_key`."""
        self._scorer = scorer
        self._cache = cache
        self._key = key
        self.forwards = 0
        self.seconds = 0.0

    def __call__(self, keep: KeepMask) -> Scores:
        keys = [
            hashlib.blake2b(self._key + row.tobytes(), digest_size=16).digest()
            for row in np.packbits(keep, axis=1)
        ]
        found = {key: self._cache.get(key) for key in keys}
        new = {key: row for row, key in enumerate(keys) if found[key] is None}
        if new:
            started = time.perf_counter()
            scores = self._scorer(keep[list(new.values())])
            self.seconds += time.perf_counter() - started
            self.forwards += len(new)
            self._cache.put(list(new), scores)
            for key, logits, slide in zip(new, scores.logits, scores.slide, strict=True):
                found[key] = logits.tobytes(), slide.tobytes()
        rows = [saved for key in keys if (saved := found[key]) is not None]
        return Scores(_stack([logits for logits, _ in rows]), _stack([slide for _, slide in rows]))


def cache_key(*parts: str | Float32 | Int64) -> Key:
    """BLAKE2b digest, 16 bytes, of what decides a mask's scores: model, occluder, embeddings, coordinates."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        if isinstance(part, str):
            digest.update(part.encode() + b"\0")
        else:
            digest.update(f"{part.dtype.str}{part.shape}".encode() + b"\0")
            digest.update(np.ascontiguousarray(part).data)
    return digest.digest()


def _stack(rows: list[bytes]) -> Float32:
    return np.frombuffer(b"".join(rows), dtype=np.float32).reshape(len(rows), -1)
