"""Which key every file of a slide was made under, so that none is taken for what it isn't any more."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from ..files import output_errors, write_text
from ..scoring.result_key import SlideContent


class FileKeys:
    """The keys of a slide's files below `out`, and the content that the slide had; in OUT/.keys/SLIDE.json.

    Files that are written later from another file, such as a map, carry the key of that file.
    """

    def __init__(self, out: Path, slide_id: str) -> None:
        self._out = out
        self._path = out / ".keys" / f"{slide_id}.json"
        self.content, self._keys = SlideContent(), dict[str, str]()
        try:
            stored = json.loads(self._path.read_text(encoding="utf-8"))
            self.content = SlideContent(**stored["content"])
            self._keys = {str(name): str(key) for name, key in stored["keys"].items()}
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            pass  # none, or another version's: everything is made anew

    def of(self, path: Path) -> str | None:
        """The key of a file, None where there is no such file or its key isn't known."""
        return self._keys.get(self._name(path)) if path.exists() else None

    def stale(self, files: Mapping[Path, str]) -> list[Path]:
        """Those of `files` that are missing or were made under another key."""
        return [path for path, key in files.items() if self.of(path) != key]

    @contextmanager
    def writing(self, files: Mapping[Path, str], content: SlideContent | None = None) -> Iterator[None]:
        """Note the keys of files that the block writes; one that ends with an error leaves them without.

        A file that was made from an earlier state of these, and is none of them, is removed.

        Raises:
            OutputError: a file can't be removed, or the note not be written.
        """
        names = {self._name(path): key for path, key in files.items()}
        earlier = {old for name, key in names.items() if (old := self._keys.get(name)) not in (None, key)}
        for name in [name for name, key in self._keys.items() if key in earlier or name in names]:
            del self._keys[name]
            if name not in names:
                with output_errors(self._out / name):
                    (self._out / name).unlink(missing_ok=True)
        self.content = content or self.content
        self._save()
        yield
        self.note(files)

    def note(self, files: Mapping[Path, str]) -> None:
        """Note the keys of files that are written; passes over those outside `out`. Raises OutputError."""
        self._keys |= {self._name(path): key for path, key in files.items() if path.is_relative_to(self._out)}
        self._save()

    def _name(self, path: Path) -> str:
        return path.relative_to(self._out).as_posix() if path.is_relative_to(self._out) else str(path)

    def _save(self) -> None:
        stored = {"content": dataclasses.asdict(self.content), "keys": dict(sorted(self._keys.items()))}
        write_text(self._path, json.dumps(stored, indent=1) + "\n")
