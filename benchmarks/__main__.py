"""`python -m benchmarks` lists the benchmarks; `python -m benchmarks NAME` runs one."""

from __future__ import annotations

import importlib
import sys

import typer

from benchmarks.common import run_driver
from gigapath_contract.command_line import fail

BENCHMARKS = {
    "attribution": (15, "occlusion masks through the server against one PyTorch forward per mask"),
    "client": (30, "the whole client against the bare encoder, its memory, resuming after 20 kills"),
    "cohort": (4, "a batch of 200 small slides against the tile encoder alone"),
    "export": (30, "exports of all presets, 100,000 tiles, fused attention"),
    "faults": (10, "1,000 slides over two servers through 40 faults: nothing lost, no byte different"),
    "front": (6, "the same requests directly and through the front"),
    "gpu": (8, "on a GPU: encoders, occlusion, Triton and the client against PyTorch, and verify"),
    "half-precision": (5, "what half precision costs the tile encoder and maps of attributions"),
    "maps": (7, "what maps find of planted lesions on slides of 56 to 10,000 tiles"),
    "reading": (5, "reading tiles against a loop over OpenSlide"),
    "serving": (25, "every kind of request against bare ONNX Runtime sessions, and every setting"),
    "slide-encoder": (10, "the slide encoder at 1,000, 10,000 and 100,000 tiles on the CPU"),
    "soak": (6, "32 clients over the limit of the server's queue for 5 minutes"),
    "viewer": (2, "the viewer's first tile, frames and memory on a slide of 20,000 tiles"),
}
"""Name of a driver and of its page in docs/benchmarks: minutes on 2 cores, and what it measures."""


def main() -> None:
    """List the benchmarks, or run the one that is named with the options that follow."""
    name, *options = sys.argv[1:] or [""]
    if not name:
        lines = (f"{key:14} {minutes:3} min  {about}" for key, (minutes, about) in BENCHMARKS.items())
        typer.echo("make bench NAME=\n  " + "\n  ".join(lines))
    elif name not in BENCHMARKS:
        fail(f"no benchmark {name!r}: choose from {', '.join(BENCHMARKS)}")
    else:
        driver = importlib.import_module(f"benchmarks.{name.replace('-', '_')}")
        sys.argv[1:] = options
        run_driver(driver.main, f"python -m benchmarks {name}")


if __name__ == "__main__":
    main()
