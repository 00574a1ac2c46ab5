"""Identical masks are scored once, also across runs: that is how an interrupted attribution goes on."""

from __future__ import annotations

import hashlib
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from ...errors import ClientError
from ..methods.scorer import Float32, Int64, Mask, Scorer, Scores

Key = bytes


class ScoreCache:
    """Scores by mask in SQLite, in `path` or, without one, in memory; every batch is committed.

    A run that is started again with the same file asks the same masks in the same order, gets those
    already scored from here and goes on where it was cut off.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        with self._told():
            self._database = sqlite3.connect(path or ":memory:")
            self._database.execute(
                "CREATE TABLE IF NOT EXISTS scores (key BLOB PRIMARY KEY, logits BLOB, slide BLOB)"
            )

    def get(self, key: Key) -> tuple[bytes, bytes] | None:
        """Logits and slide embedding saved under `key`, as float32 bytes."""
        with self._told():
            found: tuple[bytes, bytes] | None = self._database.execute(
                "SELECT logits, slide FROM scores WHERE key = ?", (key,)
            ).fetchone()
        return found

    def put(self, keys: list[Key], scores: Scores) -> None:
        """Save one batch, or nothing of it."""
        rows = zip(keys, scores.logits, scores.slide, strict=True)
        with self._told(), self._database:
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
    def _told(self) -> Iterator[None]:
        """Turn SQLite's errors into one line about the file."""
        try:
            yield
        except sqlite3.OperationalError as error:  # locked, full, not writable
            raise ClientError(
                f"{self._path}: saved masks can't be used ({error}): end other runs on them, free some space "
                "or choose another --out"
            ) from error
        except sqlite3.DatabaseError as error:
            raise ClientError(f"{self._path}: no file of saved masks ({error}): delete it") from error


class CachedScorer:
    """A scorer that asks `scorer` only for masks not yet in `memo`.

    identity: what, besides the mask, decides the scores: see `identify`.
    forwards, seconds: masks really scored here and the time it took, for the cost of a forward.
    """

    def __init__(self, scorer: Scorer, memo: ScoreCache, identity: bytes) -> None:
        self._scorer = scorer
        self._memo = memo
        self._identity = identity
        self.forwards = 0
        self.seconds = 0.0

    def __call__(self, keep: Mask) -> Scores:
        keys = [
            hashlib.blake2b(self._identity + row.tobytes(), digest_size=16).digest()
            for row in np.packbits(keep, axis=1)
        ]
        found = {key: self._memo.get(key) for key in keys}
        new = {key: row for row, key in enumerate(keys) if found[key] is None}
        if new:
            started = time.perf_counter()
            scores = self._scorer(keep[list(new.values())])
            self.seconds += time.perf_counter() - started
            self.forwards += len(new)
            self._memo.put(list(new), scores)
            for key, logits, slide in zip(new, scores.logits, scores.slide, strict=True):
                found[key] = logits.tobytes(), slide.tobytes()
        rows = [saved for key in keys if (saved := found[key]) is not None]
        return Scores(_stack([logits for logits, _ in rows]), _stack([slide for _, slide in rows]))


def identify(*parts: str | Float32 | Int64) -> bytes:
    """A digest of everything that decides the scores of a mask: export, occluder, embeddings, coordinates."""
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
