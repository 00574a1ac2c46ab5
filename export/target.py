"""The machine that is to serve: how large a request it takes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Target:
    """Tiles per batch of `tile_encoder`, and bytes that a request to `slide_occlusion` may take.

    The defaults are for a CPU: larger batches are not faster there, and small requests would wait for longer.
    """

    max_batch: int = 64
    occlusion_bytes: int = 8 << 30


CPU = Target()


def on_gpu(memory_gib: int) -> Target:
    """A GPU: batches of 128 (908 tiles/s on an H200, 849 at 64), and a third of its memory for occlusion.

    The slide encoder takes up to a third for a large slide, and weights and tiles need the rest.
    """
    return Target(max_batch=128, occlusion_bytes=(memory_gib << 30) // 3)
