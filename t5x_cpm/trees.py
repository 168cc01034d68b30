"""Nested dicts: by name and back, in two and together again. Whatever is not a dict is a leaf."""

from collections.abc import Callable, Mapping
from typing import Any

import jax

Tree = dict[str, Any]


def named(tree: Any) -> Tree:
  """'a/b/c' -> leaf. Other containers that JAX knows may be among the dicts."""
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {jax.tree_util.keystr(path, simple=True, separator='/'): leaf for path, leaf in leaves}


def nested(leaves: Mapping[str, Any]) -> Tree:
  """The inverse of `named`, for a tree of dicts."""
  tree: Tree = {}
  for name, leaf in leaves.items():
    *parents, last = name.split('/')
    node = tree
    for parent in parents:
      node = node.setdefault(parent, {})
    node[last] = leaf
  return tree


def merged(a: Tree, b: Tree) -> Tree:
  """All branches of both. Where both have a leaf, it is that of b."""
  return a | {name: merged(a[name], value) if name in a and isinstance(value, dict) else value for name, value in b.items()}


def split(tree: Tree, like: Tree, chosen: Callable[[Any], bool]) -> tuple[Tree, Tree]:
  """The leaves that are chosen, and the others, without branches that would be empty. `merged` is the inverse.

  Args:
    tree: what is split.
    like: a tree of the same structure, such as Model.leaves().
    chosen: asked about each leaf of `like`.
  """
  yes: Tree = {}
  no: Tree = {}
  for name, value in tree.items():
    if isinstance(value, dict):
      inner = split(value, like[name], chosen)
      yes |= {name: inner[0]} if inner[0] else {}
      no |= {name: inner[1]} if inner[1] else {}
    else:
      (yes if chosen(like[name]) else no)[name] = value
  return yes, no
