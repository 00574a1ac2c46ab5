"""Owen values on a tree of the slide's tiles, refined best-first: what the default map is made of.

A node's value is the mean of its marginals with its sibling absent and present, recursively down the tree
(Owen 1977; SHAP's PartitionExplainer is the same recursion on a hierarchy of features). Both contexts are
needed where evidence is redundant: with all other tumour tiles present one more changes nothing, with them
absent it changes everything.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field

import numpy as np

from ...arrays import Float64, KeepMask, Pixels
from .game import CoalitionGame
from .result import Attribution
from .trees import Tree

# Splits evaluated together. Fixed, so that values do not depend on how many masks a request holds.
SPLITS_PER_ROUND = 8
# Refinement does not stop while one marginal holds more of the average: 1/16 of the slide in 1/16 of the
# contexts.
COARSEST_AT_STOP = 1 / 256
# What counts is a node's mass over this power of its number of players: 0 would be mass alone, 1 mass per
# player. Found on planted slides; those of docs/benchmarks/maps.md were not among them.
CONCENTRATION = 0.75


@dataclass(frozen=True)
class _Marginal:
    """`weight` of the Owen average in which `node` joins the players of `context`."""

    node: int
    context: Pixels  # packed bits [ceil(G / 8)]
    before: Float64  # v(context), [K]
    after: Float64  # v(context and node), [K]
    weight: float

    @property
    def mass(self) -> Float64:
        return self.weight * (self.after - self.before)


@dataclass
class _Frontier:
    """Marginals not yet split, ordered by the concentration of their mass and by their share of the slide."""

    tree: Tree
    target_index: int
    open: dict[int, _Marginal] = field(default_factory=dict)
    resolved: list[_Marginal] = field(default_factory=list)
    open_mass: float = 0.0
    resolved_mass: float = 0.0
    _born: int = 0
    _by_concentration: list[tuple[float, int]] = field(default_factory=list)
    _by_share: list[tuple[float, int]] = field(default_factory=list)

    def add(self, marginal: _Marginal) -> None:
        mass = abs(float(marginal.mass[self.target_index]))
        size = self.tree.size(marginal.node)
        if size == 1:
            self.resolved.append(marginal)
            self.resolved_mass += mass
            return
        self.open[self._born] = marginal
        self.open_mass += mass
        heapq.heappush(self._by_concentration, (-mass / size**CONCENTRATION, self._born))
        heapq.heappush(self._by_share, (-self._share(marginal), self._born))
        self._born += 1

    def take(self, count: int) -> list[_Marginal]:
        """The `count` marginals of the most concentrated mass; of a full round, the last is the coarsest.

        A node in which evidence for and against cancels has no mass and would never be split otherwise.
        """
        heaps = [self._by_concentration] * count
        if count == SPLITS_PER_ROUND:
            heaps[-1] = self._by_share
        return [self._pop(heap) for heap in heaps]

    @property
    def unresolved(self) -> float:
        """Fraction of the absolute mass that lies in nodes of several players."""
        if not self.open:
            return 0.0
        total = self.open_mass + self.resolved_mass
        return max(self.open_mass, 0.0) / total if total > 0 else 1.0

    @property
    def coarsest(self) -> float:
        """The largest share of the average that one open marginal holds."""
        while self._by_share and self._by_share[0][1] not in self.open:
            heapq.heappop(self._by_share)
        return -self._by_share[0][0] if self._by_share else 0.0

    def _share(self, marginal: _Marginal) -> float:
        return marginal.weight * self.tree.size(marginal.node) / self.tree.size(0)

    def _pop(self, heap: list[tuple[float, int]]) -> _Marginal:
        while (number := heapq.heappop(heap)[1]) not in self.open:
            pass
        marginal = self.open.pop(number)
        self.open_mass -= abs(float(marginal.mass[self.target_index]))
        return marginal


def partition_shap(
    game: CoalitionGame,
    tree: Tree,
    *,
    max_evals: int = 512,
    target_index: int = 0,
    tolerance: float = 0.05,
) -> Attribution:
    """Owen values of the players on a `tree` over them.

    max_evals: largest number of masks scored.
    target_index: the output whose mass decides which nodes are refined. A run with more masks scores those
        of one with fewer, too.
    tolerance: stop once unresolved nodes hold less than this fraction of the absolute mass and none of them
        is coarse; 0 never stops early.

    The values sum to v(all) - v(none) at every budget: an unresolved node's value is split evenly among its
    tiles, and `leaf_size` says where.
    """
    empty, full = game.base_and_full
    spent = 2
    frontier = _Frontier(tree, target_index)
    frontier.add(_Marginal(0, np.packbits(np.zeros(game.players, dtype=bool)), empty, full, 1.0))
    while frontier.open and spent + 2 <= max_evals:
        if frontier.unresolved < tolerance and frontier.coarsest <= COARSEST_AT_STOP:
            break
        parents = frontier.take(min(SPLITS_PER_ROUND, len(frontier.open), (max_evals - spent) // 2))
        values = game.values(np.concatenate([_halves(tree, parent, game.players) for parent in parents]))
        spent += len(values)
        for parent, (left, right) in zip(parents, values.reshape(len(parents), 2, -1), strict=True):
            for marginal in _split(tree, parent, left, right, game.players):
                frontier.add(marginal)
    player_values, node_tiles = _spread(tree, [*frontier.resolved, *frontier.open.values()], game)
    return game.attribution(
        "partition_shap",
        player_values,
        evaluations=spent,
        additive=True,
        leaf_size=node_tiles[game.feature_mask],
        unresolved=frontier.unresolved,
    )


def _halves(tree: Tree, parent: _Marginal, players: int) -> KeepMask:
    """The two coalitions [2, G] that split `parent`: its context with one child each."""
    context = np.unpackbits(parent.context, count=players).astype(bool)
    rows = np.stack([context, context])
    for row, child in zip(rows, tree.children(parent.node), strict=True):
        row[tree.members(child)] = True
    return rows


def _split(
    tree: Tree, parent: _Marginal, left: Float64, right: Float64, players: int
) -> tuple[_Marginal, ...]:
    """Each child joins with its sibling absent and present, at half the weight: the mass is kept."""
    a, b = tree.children(parent.node)
    with_a, with_b = (np.packbits(row) for row in _halves(tree, parent, players))
    half = parent.weight / 2
    return (
        _Marginal(a, parent.context, parent.before, left, half),
        _Marginal(a, with_b, right, parent.after, half),
        _Marginal(b, parent.context, parent.before, right, half),
        _Marginal(b, with_a, left, parent.after, half),
    )


def _spread(tree: Tree, marginals: list[_Marginal], game: CoalitionGame) -> tuple[Float64, Float64]:
    """Values of the players [G, K] and the mean number of tiles of the nodes that hold them [G]."""
    sizes = game.sizes
    values = np.zeros((game.players, len(game.outputs.names)))
    nodes = np.zeros(game.players)
    for marginal in marginals:
        members = tree.members(marginal.node)
        tiles = sizes[members]
        values[members] += marginal.mass * (tiles / tiles.sum())[:, None]
        nodes[members] += marginal.weight * tiles.sum()
    return values, nodes
