"""Whether a level of a slide is level 0 made smaller, judged by the sizes alone."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from .tiff import Page

SPOT = 32  # side in level pixels of what is compared between two levels

Sizes = Sequence[tuple[int, int]]


def downsamples_of(sizes: Sizes) -> tuple[float, ...]:
    """Level-0 pixels per pixel of each level, where the file states none: the mean of both ratios."""
    return tuple(sum(_ratios(level, sizes)) / 2 for level in range(len(sizes)))


def _ratios(level: int, sizes: Sizes) -> list[float]:
    return [whole / part for whole, part in zip(sizes[0], sizes[level], strict=True)]


def misfit(level: int, sizes: Sizes, downsamples: Sequence[float], pages: Sequence[Page]) -> str:
    """Why `level` can't be level 0 made smaller; empty where its size fits.

    Args:
        level: 1 or more.
        sizes, downsamples: of all levels, as OpenSlide has them.
        pages: what `tiff.read_pages` found.
    """
    ratios = _ratios(level, sizes)
    if min(ratios) < 1 or not all(math.isfinite(ratio) for ratio in ratios):
        return "it is larger than level 0"
    downsample = downsamples[level]
    stated = not math.isclose(downsample, sum(ratios) / 2, rel_tol=1e-6)  # by the format, not from the sizes
    if stated:
        return ""
    if any(abs(whole / downsample - part) > 1 for whole, part in zip(sizes[0], sizes[level], strict=True)):
        return f"its width is 1/{ratios[0]:.5g} of level 0's, its height 1/{ratios[1]:.5g}"
    page = _page(level, sizes, pages)
    if page is None:
        return ""
    level0 = _page(0, sizes, pages)
    if page.subfile & 4 or (level0 and page.layout != level0.layout):
        return "it is a mask, or stored otherwise than level 0"
    return "it is padded to whole tiles" if _is_padded(sizes[0], page, downsample) else ""


def spots(size: tuple[int, int]) -> Iterator[tuple[int, int]]:
    """Corners (x, y) of five spots across a level of `size` (w, h): its middle, and that of each quarter."""
    for x, y in ((2, 2), (1, 1), (3, 1), (1, 3), (3, 3)):
        yield max(0, size[0] * x // 4 - SPOT // 2), max(0, size[1] * y // 4 - SPOT // 2)


def _page(level: int, sizes: Sizes, pages: Sequence[Page]) -> Page | None:
    """A level's page in a generic TIFF: OpenSlide takes the first page and all reduced ones, by width."""
    taken = sorted((p for p in pages if p.first or p.subfile & 1), key=lambda page: -page.size[0])
    return taken[level] if [page.size for page in taken] == list(sizes) else None


def _is_padded(level0: tuple[int, int], page: Page, downsample: float) -> bool:
    """Whether a level is level 0 at 1/2, 1/4, 1/8 … rounded up to whole tiles, so that its scale is another.

    Where both axes are padded by the same part, their ratios agree.
    """
    factor = 2 ** math.ceil(math.log2(downsample) - 1e-9)
    exact = [side / factor for side in level0]
    padded = [math.ceil(side / tile - 1e-9) * tile for side, tile in zip(exact, page.tile, strict=True)]
    return padded == list(page.size) and any(
        side - part > 1 for side, part in zip(page.size, exact, strict=True)
    )
