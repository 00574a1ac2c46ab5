"""Regions of tiles: sliding windows and a quadtree over tile coordinates."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ...arrays import Float64, Int64
from ...errors import ClientError


def grid_cells(coords: Int64, step: tuple[int, int]) -> Int64:
    """Column and row [N, 2] of tiles at `coords` on a grid of `step` (x, y), all in level-0 px."""
    cells: Int64 = (coords - coords.min(axis=0)) // np.array(step)
    return cells


def sliding_windows(cells: Int64, size: int, stride: int) -> list[Int64]:
    """Tile indices of every non-empty window of size x size tiles, with steps of `stride` tiles.

    The first windows start outside the slide so that border tiles are covered as often as inner ones:
    (size / stride)² times where stride divides size.

    Raises:
        ClientError: the stride is under 1 or over the size.
    """
    if not 1 <= stride <= size:
        raise ClientError(f"stride must lie between 1 and the window's size ({size}), not {stride}")
    first = -((size - 1) // stride) * stride
    members: dict[tuple[int, int], list[int]] = {}
    for tile, (x, y) in enumerate(cells.tolist()):
        for column in _origins(x, size, stride, first):
            for row in _origins(y, size, stride, first):
                members.setdefault((row, column), []).append(tile)
    return [np.array(tiles, dtype=np.int64) for _, tiles in sorted(members.items())]


def _origins(at: int, size: int, stride: int, first: int) -> range:
    lowest = at - size + 1
    start = first + -((first - lowest) // stride) * stride
    return range(start, at + 1, stride)


@dataclass(frozen=True)
class Quadtree:
    """A binary tree over G points; node 0 is the root and node i holds order[start[i]:stop[i]].

    Two levels make one of a quadtree: a node's bounding box is cut in the middle of its longer side.
    children: [nodes, 2], -1 in a leaf.
    """

    order: Int64
    start: Int64
    stop: Int64
    children: Int64

    def members(self, node: int) -> Int64:
        """Indices of the points of `node`."""
        return self.order[self.start[node] : self.stop[node]]

    def size(self, node: int) -> int:
        """Number of points of `node`."""
        return int(self.stop[node] - self.start[node])


def quadtree(points: Float64 | Int64) -> Quadtree:
    """The tree over `points` [G, 2]; their order does not matter."""
    points = np.asarray(points, dtype=np.float64)
    order = np.lexsort((points[:, 0], points[:, 1])).astype(np.int64)
    start, stop, children = [0], [len(points)], [[-1, -1]]
    pending = [0]
    while pending:
        node = pending.pop()
        begin, end = start[node], stop[node]
        if end - begin < 2:
            continue
        inside = points[order[begin:end]]
        low, high = inside.min(axis=0), inside.max(axis=0)
        axis = int((high - low).argmax())
        second = inside[:, axis] > (low[axis] + high[axis]) / 2
        if not second.any():  # all at one place
            second = np.arange(end - begin) >= (end - begin) // 2
        order[begin:end] = np.concatenate([order[begin:end][~second], order[begin:end][second]])
        middle = end - int(second.sum())
        children[node] = [len(start), len(start) + 1]
        pending += children[node]
        start += [begin, middle]
        stop += [middle, end]
        children += [[-1, -1], [-1, -1]]
    return Quadtree(order, np.array(start), np.array(stop), np.array(children))


def coarse_regions(points: Float64 | Int64, at_most: int) -> Int64:
    """Region of every point [G], 0..R-1: the quadtree's largest node is split until R is `at_most`."""
    tree = quadtree(points)
    nodes = [0]
    while len(nodes) < at_most:
        largest = max(nodes, key=tree.size)
        if tree.size(largest) < 2:
            break
        nodes.remove(largest)
        nodes += tree.children[largest].tolist()
    labels = np.empty(len(points), dtype=np.int64)
    for number, node in enumerate(sorted(nodes, key=lambda n: int(tree.start[n]))):
        labels[tree.members(node)] = number
    return labels


def centres(coords: Int64, feature_mask: Int64) -> Float64:
    """Mean coordinates [G, 2] of every region's tiles."""
    counts = np.bincount(feature_mask)
    return np.stack([np.bincount(feature_mask, coords[:, axis]) / counts for axis in (0, 1)], axis=1)
