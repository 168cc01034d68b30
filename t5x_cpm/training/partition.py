"""A nested dict in two: the leaves that a predicate chooses, and the others."""

from collections.abc import Callable
from typing import Any

from t5x_cpm.models.leaf import Leaf

Tree = dict[str, Any]


def split(tree: Tree, like: Tree, chosen: Callable[[Any], bool]) -> tuple[Tree, Tree]:
  """The leaves that are chosen, and the others: nested dicts without the branches that would be empty.

  Args:
    tree: nested dict; anything that is not a dict is a leaf.
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


def join(a: Tree, b: Tree) -> Tree:
  """The inverse of `split`."""
  both = a | b
  for name in a.keys() & b.keys():
    both[name] = join(a[name], b[name])
  return both


def has_gradient(leaf: Leaf) -> bool:
  """Whether a parameter changes by its gradient; the others are fixed, or change by a rule of their own."""
  return leaf.update == 'gradient'
