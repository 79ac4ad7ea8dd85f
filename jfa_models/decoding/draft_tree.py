"""Drafted tokens as a tree: several ways in which a text may go on, verified in one step. No jax."""

import functools
from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Bool


class DraftTree:
    """Drafted tokens, each behind another one or behind the text.

    Attributes:
      tokens: in an order in which a token comes after the one before it in the text.
      parents: for each token, the index of the one before it; -1: it follows the text.
    """

    def __init__(self, tokens: Sequence[int] = (), parents: Sequence[int] | None = None):
        """parents: None: each token follows the one before it: a chain."""
        self.tokens = list(tokens)
        self.parents = list(range(-1, len(self.tokens) - 1) if parents is None else parents)

    @classmethod
    def of_paths(cls, paths: Iterable[Sequence[int]]) -> "DraftTree":
        """The tree of these texts, in which common beginnings are there once."""
        tree = cls()
        for path in paths:
            tree.add(path)
        return tree

    def add(self, path: Sequence[int]) -> int:
        """Adds a text, apart from its tokens that are there already; the index of its last token."""
        node = -1
        for token in path:
            if (child := self.child(node, token)) is None:
                child = self.append(token, node)
            node = child
        return node

    def append(self, token: int, parent: int) -> int:
        """Adds a token behind another one, and returns its index."""
        self.tokens.append(token)
        self.parents.append(parent)
        self._children[parent, token] = len(self.tokens) - 1
        return len(self.tokens) - 1

    def __len__(self) -> int:
        return len(self.tokens)

    @functools.cached_property
    def _children(self) -> dict[tuple[int, int], int]:
        found: dict[tuple[int, int], int] = {}
        for node, key in enumerate(zip(self.parents, self.tokens, strict=True)):
            found.setdefault(key, node)
        return found

    @property
    def is_chain(self) -> bool:
        """Whether each token follows the one before it."""
        return self.parents == list(range(-1, len(self.tokens) - 1))

    def child(self, node: int, token: int) -> int | None:
        """The index of this token behind that of a node, if it was drafted there."""
        return self._children.get((node, token))

    def first(self, n: int) -> "DraftTree":
        """Its first n tokens."""
        return self if n >= len(self) else DraftTree(self.tokens[:n], self.parents[:n])

    def text(self, node: int) -> list[int]:
        """The tokens up to that of a node."""
        found = []
        while node >= 0:
            found.append(self.tokens[node])
            node = self.parents[node]
        return found[::-1]

    def seen(self, width: int) -> Bool[np.ndarray, "drafted+1 width"]:
        """Row 0 is for the last token of the text, row i + 1 for token i: which of these it sees, itself included."""
        rows = np.zeros((len(self) + 1, width), bool)
        rows[0, 0] = True
        for node, parent in enumerate(self.parents):
            rows[node + 1] = rows[parent + 1]
            rows[node + 1, node + 1] = True
        return rows
