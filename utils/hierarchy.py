"""The label tree, and every table that follows from it.

    h = Hierarchy.load("configs/hierarchies/pascal_part.json")
    targets, known = h.encode(labels)        # (B, H, W) node ids -> (B, N, H, W) each
    halves = h.level_of(labels, 1)           # the same map in the classes of level 2

Levels are counted from the leaves: level 1 is the leaves, the last level the roots. In code they are indexed
from 0 (`level_classes[0]` is level 1); only names shown to people (`mIoU1`) count from 1.
"""

import copy
import hashlib
import json
import re
from collections.abc import Callable, Hashable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from utils.errors import UserError
from utils.files import read_json
from utils.tree_file import checked_nodes, is_int, is_text

NO_FOLDER = re.compile(r"^\.|[/\\:]|^(overlay|report|scores)$", re.IGNORECASE)  # each level has one, beside others
MAX_LABEL = 65535  # a mask is a PNG of 8 or 16 bits
_RIGHT = {"left": "right", "Left": "Right", "LEFT": "RIGHT", "l": "r", "L": "R"}
_SIDES = re.compile(r"left|Left|LEFT|(?<![A-Za-z])[lL](?![A-Za-z])")


class Hierarchy:
    """A forest of classes. Node ids are 0..N-1 and index every table and every channel of the logits.

    Raises: UserError, naming the source and the node, for anything that is not a forest with unique names.
    """

    def __init__(self, tree: dict[str, Any], source: str = "tree") -> None:
        self._tree = copy.deepcopy(tree)
        nodes = checked_nodes(tree, source)
        self.name: str = tree["name"]
        self.ignore_index: int = tree["ignore_index"]
        self.level_names = tuple(tree["levels"]) if isinstance(tree["levels"], list) else (tree["levels"],)
        self.names: tuple[str, ...] = tuple(node["name"] for node in nodes)
        self.parents: tuple[int | None, ...] = tuple(node["parent"] for node in nodes)
        self.colours: tuple[tuple[int, ...], ...] = tuple(tuple(node["colour"]) for node in nodes)
        self.background = frozenset(v for v, node in enumerate(nodes) if node.get("background"))
        self.mirrors = {v: node["mirror"] for v, node in enumerate(nodes) if node.get("mirror") is not None}

        self.num_nodes = len(nodes)
        self.paths = tuple(self._path(v, source) for v in range(self.num_nodes))  # root first, the node itself last
        self.preorder = tuple(sorted(range(self.num_nodes), key=self.paths.__getitem__))  # parents before children
        self.edges = tuple((self.parents[v], v) for v in self.preorder if self.parents[v] is not None)
        self.children = tuple(tuple(v for v, p in enumerate(self.parents) if p == u) for u in range(self.num_nodes))
        self.roots = tuple(v for v, parent in enumerate(self.parents) if parent is None)
        self.leaves = tuple(v for v in range(self.num_nodes) if not self.children[v])
        self.num_leaves = len(self.leaves)
        self.num_levels = max(map(len, self.paths))
        self.level_tables = tuple(self._level_table(level) for level in range(self.num_levels))
        self.level_classes = tuple(sorted({table[leaf] for leaf in self.leaves}) for table in self.level_tables)
        self._check(source)
        self.mirror = self._mirror_table(source)
        self._cache: dict[Hashable, Tensor] = {}

    @classmethod
    def load(cls, path: str | Path) -> "Hierarchy":
        """Reads a tree file. Raises: UserError for a file that is missing, not strict JSON, or not a tree."""
        return cls(read_json(path), str(path))

    @classmethod
    def from_dict(cls, tree: dict[str, Any], source: str = "tree") -> "Hierarchy":
        """The inverse of `to_dict`."""
        return cls(tree, source)

    def to_dict(self) -> dict[str, Any]:
        """The tree as plain JSON types: what a tree file holds and what a checkpoint stores."""
        return copy.deepcopy(self._tree)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of ids, names, parents and leaves: equal when weights and masks are interchangeable."""
        canonical = [[v, self.names[v], self.parents[v], v in self.leaves] for v in range(self.num_nodes)]
        return hashlib.sha256(json.dumps(canonical, ensure_ascii=True).encode()).hexdigest()

    # ---- labels --------------------------------------------------------------------------------------------

    def index_of(self, labels: Tensor) -> Tensor:
        """Label map -> columns of the label tables, int64: the node id, or N for void. Leaves `labels` alone.

        Raises: UserError for an id that is neither a node nor void (on the CPU; elsewhere asking would stall
        the device, and the look-up itself fails there).
        """
        index = labels.long()  # may be `labels` itself: no operation in place on it
        void = index == self.ignore_index
        index = (index + (index >= self.num_nodes)).masked_fill_(void, self.num_nodes)
        if index.device.type == "cpu" and index.numel() and not torch.compiler.is_compiling():
            lowest, highest = index.aminmax()
            if int(lowest) < 0 or int(highest) > self.num_nodes:
                strangers = sorted(set(labels.unique().tolist()) - {*range(self.num_nodes), self.ignore_index})
                raise UserError(
                    f"labels hold {strangers[:5]}; the tree {self.name!r} has nodes 0 to {self.num_nodes - 1} "
                    f"and void {self.ignore_index}; encode the masks for this tree"
                )
        return index

    def encode(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Targets (1 on the label's path, else 0) and which nodes are known (all but those below the label).

        Shape: (..., H, W) node ids or `ignore_index` -> (..., N, H, W) float32 and (..., N, H, W) bool.
        """
        signs = self.signs(labels.device)[:, self.index_of(labels)].movedim(0, -3)
        return (signs > 0).float(), signs != 0

    def level_of(self, labels: "Tensor | np.ndarray", level: int) -> "Tensor | np.ndarray":
        """The class of each pixel at `level` (0 is level 1); void where the label lies above that level.

        Shape: any, of any integer type; the result has the same shape and type.
        """
        if isinstance(labels, np.ndarray):
            return self._level_lut(level).numpy().astype(labels.dtype)[labels]
        lut = self.cached(("level", level), labels.device, labels.dtype, lambda: self._level_lut(level))
        return lut[labels.long()]  # .long(): a byte tensor as an index would be read as a mask

    # ---- tables by label: column y belongs to node y, column N to void --------------------------------------

    # Void is an imaginary node above all roots: everything lies below it, so nothing is known about it.

    def signs(self, device: torch.device | str, dtype: torch.dtype = torch.float32) -> Tensor:
        """+1 where the node is on the label's path, -1 where on no path with it, 0 where unknown. Shape: (N, N + 1)."""
        return self.cached("signs", device, dtype, self._make_signs)

    def leaves_below(self) -> Tensor:
        """1 where the leaf lies at or below the label, else 0. Shape: (leaves, N + 1) float32."""
        below = [[y in self.paths[leaf] for y in range(self.num_nodes)] + [True] for leaf in self.leaves]
        return torch.tensor(below, dtype=torch.float32)

    def leaf_index(self, device: torch.device | str) -> Tensor:
        """Ids of the leaves. Shape: (leaves,) int64."""
        return self.cached("leaf_index", device, torch.int64, lambda: torch.tensor(self.leaves))

    def edge_index(self, device: torch.device | str) -> Tensor:
        """Row 0 the parents, row 1 the children, in the order of `edges`. Shape: (2, E) int64."""
        return self.cached("edge_index", device, torch.int64, lambda: torch.tensor(self.edges).view(-1, 2).t())

    def cached(
        self, key: Hashable, device: torch.device | str, dtype: torch.dtype, make: Callable[[], Tensor]
    ) -> Tensor:
        """The table `make()` on a device, made on first use and kept: tables are tiny, transfers stall."""
        full_key = (key, torch.device(device), dtype)
        if full_key not in self._cache:
            with torch.inference_mode(False):  # a table made during evaluation must also serve training
                self._cache[full_key] = make().to(device, dtype)
        return self._cache[full_key]

    # ---- construction --------------------------------------------------------------------------------------

    def _path(self, v: int, source: str) -> tuple[int, ...]:
        path = [v]
        while (parent := self.parents[path[0]]) is not None:
            if parent in path:
                loop = " -> ".join(self.names[u] for u in reversed([parent, *path]))
                raise UserError(f"{source}: node {v} ({self.names[v]}) has no root: its parents form a cycle, {loop}")
            path.insert(0, parent)
        return tuple(path)

    def _level_table(self, level: int) -> tuple[int, ...]:
        """node -> its class at `level`: the ancestor at that depth, a leaf above it itself, else void."""
        depth = self.num_levels - level  # roots have depth 1
        return tuple(
            path[depth - 1] if len(path) >= depth else self.ignore_index if self.children[v] else v
            for v, path in enumerate(self.paths)
        )

    def _level_lut(self, level: int) -> Tensor:
        lut = torch.full((self.ignore_index + 1,), self.ignore_index)
        lut[: self.num_nodes] = torch.tensor(self.level_tables[level])
        return lut

    @cached_property
    def heights(self) -> tuple[int, ...]:
        """The longest way down from each node to a leaf; 0 for a leaf."""
        deepest = [max(len(path) for path in self.paths if v in path) for v in range(self.num_nodes)]
        return tuple(depth - len(path) for depth, path in zip(deepest, self.paths, strict=True))

    def shared(self, u: int, v: int) -> int:
        """How many nodes the paths of two nodes have in common: the last of them is where they meet."""
        return sum(a == b for a, b in zip(self.paths[u], self.paths[v], strict=False))

    def distance(self, u: int, v: int) -> int:
        """Edges between two nodes, where all roots hang from one more node."""
        return len(self.paths[u]) + len(self.paths[v]) - 2 * self.shared(u, v)

    def _make_signs(self) -> Tensor:
        n = range(self.num_nodes)
        return torch.tensor(
            [[1 if v in self.paths[y] else 0 if y in self.paths[v] else -1 for y in n] + [0] for v in n]
        )

    def _check(self, source: str) -> None:
        """What one node alone cannot show."""
        if not is_text(self.name):
            raise UserError(f"{source}: 'name' must be a non-empty text, not {self.name!r}")
        if not is_int(self.ignore_index) or not self.num_nodes <= self.ignore_index <= MAX_LABEL:
            raise UserError(
                f"{source}: 'ignore_index' is {self.ignore_index!r}; it must be an integer from {self.num_nodes} "
                f"(the number of nodes) to {MAX_LABEL}, usually 255"
            )
        is_odd = any(not is_text(name) or NO_FOLDER.search(name) for name in self.level_names)
        if is_odd or not len(self.level_names) == len(set(self.level_names)) == self.num_levels:
            raise UserError(
                f"{source}: 'levels' is {list(self.level_names)}; the tree is {self.num_levels} levels deep, so give "
                f"{self.num_levels} different names, the leaves' level first. They name folders: without / \\ : or a "
                "first dot, and none of overlay, report, scores"
            )
        for what, values in (("name", self.names), ("colour", self.colours)):
            for v, value in enumerate(values):
                if (first := values.index(value)) != v:
                    raise UserError(
                        f"{source}: node {v} ({self.names[v]}) has the same {what} {value!r} as node {first} "
                        f"({self.names[first]}); give it another"
                    )
        for v in sorted(self.background - ({*self.roots} & {*self.leaves})):
            raise UserError(f"{source}: node {v} ({self.names[v]}) is background; only a root without children can be")

    # ---- sides: two nodes that swap in a mirrored photo ------------------------------------------------------

    def _mirror_table(self, source: str) -> tuple[int, ...] | None:
        """Node -> the node that it is in a mirror, itself where it names none; None where no two nodes swap.

        Raises: UserError where a name is no node's, is not named back, or would not give a tree again.
        """
        table = list(range(self.num_nodes))
        for v, name in self.mirrors.items():
            named = self.names.index(name) if name in self.names else None
            if named is None or self.mirrors.get(named) != self.names[v]:
                where = f"{source}: node {v} ({self.names[v]})"
                raise UserError(f"{where} names the mirror {name!r}, which is no node that names it back")
            table[v] = named
        for v, w in enumerate(table):
            if self.parents[w] != (None if self.parents[v] is None else table[self.parents[v]]):
                raise UserError(
                    f"{source}: the mirror of node {v} ({self.names[v]}) is {self.names[w]!r}; two nodes that swap "
                    "stand below one parent, or below two that swap"
                )
        return None if table == list(range(self.num_nodes)) else tuple(table)

    def check_sides(self, source: str, way_out: str) -> None:
        """Before photos are mirrored. Raises: UserError where names differ as left and right do, and name no mirror."""
        if pairs := self.unpaired_sides():
            lines = "".join(f'\n  {a}: "mirror": "{b}"\n  {b}: "mirror": "{a}"' for a, b in pairs)
            raise UserError(
                f"{source}: {pairs[0][0]!r} and {pairs[0][1]!r} look like two sides, which swap in a mirrored photo, "
                f"but the tree does not say so. Add to the nodes:{lines}\n(or each node's own name where nothing "
                f"swaps), or {way_out}"
            )

    def unpaired_sides(self) -> list[tuple[str, str]]:
        """Names that differ as left and right do, and name no mirror."""
        pairs = [(name, _SIDES.sub(lambda m: _RIGHT[m[0]], name)) for name in self.names if _SIDES.search(name)]
        short = [(name, "r" + name[1:]) for name in self.names if name[0] == "l" and "r" + name[1:] in self.names]
        pairs += short if len(short) > 1 else []  # leye and reye, lhand and rhand; land and rand alone say nothing
        named = {self.names[v] for v in self.mirrors}
        return [pair for pair in dict.fromkeys(pairs) if pair[1] in self.names and not named & {*pair}]
