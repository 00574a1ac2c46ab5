"""Open slides whose TIFF directories were damaged at random, in a process that may die: used as a script."""

from __future__ import annotations

import logging
import struct
import sys
from pathlib import Path

import numpy as np
import tifffile

from client.batch.doctor import check_slide
from client.scoring.score import SlideSource


def damage(path: Path, rng: np.random.Generator) -> None:
    """Overwrite parts of one or two entries of a TIFF's directories."""
    with tifffile.TiffFile(path) as file:
        entries = [tag.offset for page in file.pages for tag in page.aspage().tags]
    data = bytearray(path.read_bytes())
    for _ in range(rng.integers(1, 3)):
        entry, kind = entries[rng.integers(len(entries))], rng.integers(3)
        if kind == 0:
            data[entry + int(rng.integers(2, 12))] = rng.integers(256)
        else:  # the count, or the value
            number = int(rng.choice([0, 1, 1 << 16, 1 << 24, (1 << 31) - 1, (1 << 32) - 1]))
            data[entry + 4 * kind : entry + 4 * kind + 4] = struct.pack("<I", number)
    path.write_bytes(data)


def main() -> None:
    """`fuzzed.py SLIDE COUNT`: print the state and the detail of each damaged copy, a line each."""
    logging.disable()
    clean, count = Path(sys.argv[1]), int(sys.argv[2])
    copy = clean.with_name("damaged.tif")
    for seed in range(count):
        copy.write_bytes(clean.read_bytes())
        damage(copy, np.random.default_rng(seed))
        check, _ = check_slide(SlideSource(copy), None)
        print(check.state, check.detail.replace("\n", "\\n"), flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
