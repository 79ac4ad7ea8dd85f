"""Trees of drafts: what each token follows, against plain searches."""

import random

import numpy as np
import pytest

from jfa_models.decoding.draft_tree import DraftTree


def random_tree(rng, n):
    tree = DraftTree()
    while len(tree) < n:
        parent, token = rng.randrange(-1, len(tree)), rng.randrange(5)
        if tree.child(parent, token) is None:
            assert tree.append(token, parent) == len(tree) - 1
    return tree


def ancestors(tree, node):
    return [] if node < 0 else [*ancestors(tree, tree.parents[node]), node]


@pytest.mark.parametrize("seed", range(5))
def test_a_token_sees_those_it_follows(seed):
    tree = random_tree(random.Random(seed), 20)
    seen = tree.seen(24)
    assert seen.shape == (21, 24)
    for node in range(-1, 20):
        assert np.flatnonzero(seen[node + 1]).tolist() == [0, *(x + 1 for x in ancestors(tree, node))]
        assert tree.text(node) == [tree.tokens[x] for x in ancestors(tree, node)]


def test_texts_share_their_beginnings():
    tree = DraftTree.of_paths([[1, 2, 3], [1, 2, 4], [], [5], [1, 2]])
    assert (tree.tokens, tree.parents) == ([1, 2, 3, 4, 5], [-1, 0, 1, 1, -1])
    assert tree.add([1, 2, 4]) == 3 and len(tree) == 5
    assert tree.child(1, 4) == 3 and tree.child(-1, 5) == 4 and tree.child(0, 5) is None
    assert not tree.is_chain and not tree.first(4).is_chain and tree.first(3).is_chain
    assert tree.first(9) is tree and tree.first(3).tokens == [1, 2, 3]


def test_a_chain():
    chain = DraftTree([7, 7, 8])
    assert chain.is_chain and chain.parents == [-1, 0, 1] and DraftTree().is_chain
    assert (chain.seen(4) == np.tri(4, dtype=bool)).all()
    assert chain.child(-1, 7) == 0 and chain.child(0, 7) == 1 and chain.child(1, 7) is None
    assert not DraftTree() and chain
