"""Binary trees over players, by place and by look, which split a node when its children are first asked for.

So a tree over 100,000 tiles costs what its splits cost, and nobody needs more splits than half the masks.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ...arrays import Bool, Float32, Float64, Int64

COMPONENTS = 16
"""Principal components of the embeddings by which tiles look alike; all of them give the same trees."""
SAMPLE = 8192


class Tree:
    """A binary tree over G players; node 0 holds all of them, and a node of one player has no children."""

    def __init__(self, order: Int64, halve: Callable[[Int64], Bool]) -> None:
        """`halve`: for the players of a node [n >= 2], in `order`, which of them go to the second child.

        Where it puts all of them on one side, the node is cut in the middle of their order.
        """
        self._halve = halve
        self._members: list[Int64] = [order]
        self._children: dict[int, tuple[int, int]] = {}

    def members(self, node: int) -> Int64:
        """The players of `node`."""
        return self._members[node]

    def size(self, node: int) -> int:
        """Number of players of `node`."""
        return len(self._members[node])

    def children(self, node: int) -> tuple[int, int]:
        """The two halves of a node of several players."""
        if node not in self._children:
            members = self._members[node]
            second = self._halve(members)
            if second.all() or not second.any():
                second = np.arange(len(members)) >= len(members) // 2
            first = len(self._members)
            self._members += [members[~second], members[second]]
            self._children[node] = first, first + 1
        return self._children[node]

    def parts(self, at_most: int, spread: Callable[[Int64], float] = len) -> Int64:
        """Part of every player [G], 0..R-1: that of the largest `spread` is split until they are `at_most`.

        spread: of a node's players; their number by default.
        """
        nodes = [0]
        while len(nodes) < at_most:
            divisible = [node for node in nodes if self.size(node) > 1]
            if not divisible:
                break
            largest = max(divisible, key=lambda node: spread(self.members(node)))
            at = nodes.index(largest)
            nodes[at : at + 1] = self.children(largest)
        labels = np.empty(self.size(0), dtype=np.int64)
        for number, node in enumerate(nodes):
            labels[self.members(node)] = number
        return labels


def by_place(points: Float64 | Int64) -> Tree:
    """The tree over `points` [G, 2]: a node's bounding box is cut in the middle of its longer side.

    Two levels make one of a quadtree. The points' order does not matter.
    """
    points = np.asarray(points, dtype=np.float64)

    def halve(members: Int64) -> Bool:
        inside = points[members]
        low, high = inside.min(axis=0), inside.max(axis=0)
        axis = int((high - low).argmax())
        return np.asarray(inside[:, axis] > (low[axis] + high[axis]) / 2)

    return Tree(np.lexsort((points[:, 0], points[:, 1])).astype(np.int64), halve)


def by_look(features: Float32 | Float64) -> Tree:
    """The tree over players' `features` [G, D]: a node is cut at its mean, along its principal direction.

    (Principal direction divisive partitioning, Boley 1998, on the leading components of all players.)
    """
    components = principal_components(features, COMPONENTS)

    def halve(members: Int64) -> Bool:
        centred = components[members] - components[members].mean(axis=0)
        return np.asarray(centred @ _principal_direction(centred) <= 0)

    return Tree(np.arange(len(features), dtype=np.int64), halve)


def principal_components(features: Float32 | Float64, count: int) -> Float64:
    """The features' first `count` principal components [G, min(count, D)], in units of their RMS distance.

    The directions are those of at most `SAMPLE` players, evenly spaced, so that any slide is quick.
    """
    centre = features.mean(axis=0, dtype=np.float64)
    sample = features[:: -(-len(features) // SAMPLE)].astype(np.float64) - centre
    scale = float(np.sqrt(np.square(sample).sum(axis=1).mean())) or 1.0
    directions = np.linalg.eigh(sample.T @ sample)[1][:, ::-1][:, :count] / scale
    blocks = np.array_split(np.arange(len(features)), -(-len(features) // SAMPLE))
    projected = np.concatenate([(features[block] - centre) @ directions for block in blocks])
    # Rounded, so that tiles that are the same tile stay so.
    return np.asarray(projected.round(9))


def player_means(values: Float32 | Float64 | Int64, feature_mask: Int64) -> Float64:
    """Mean rows [G, ...] of the tiles [N, ...] of every player."""
    counts = np.bincount(feature_mask)
    starts = np.concatenate([[0], counts[:-1].cumsum()])
    sums = np.add.reduceat(values[feature_mask.argsort(kind="stable")], starts, axis=0, dtype=np.float64)
    return np.asarray(sums / counts[:, None])


def _principal_direction(centred: Float64) -> Float64:
    """The direction [C] of the largest variance; its largest entry is positive, so that it is one of two."""
    count, width = centred.shape
    if count < width:
        direction = centred.T @ np.linalg.eigh(centred @ centred.T)[1][:, -1]
    else:
        direction = np.linalg.eigh(centred.T @ centred)[1][:, -1]
    return np.asarray(direction * np.sign(direction[np.abs(direction).argmax()]))
