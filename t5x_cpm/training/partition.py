"""A tree of parameters in two: what a step trains, and the rest."""

from typing import Any

Tree = dict[str, Any]


def split(tree: Tree, labels: Tree, label: Any = 'train') -> tuple[Tree, Tree]:
  """The leaves with this label, and the others: nested dicts without the branches that would be empty.

  Args:
    tree: nested dict; anything that is not a dict is a leaf.
    labels: of the same structure.
    label: to look for.
  """
  chosen: Tree = {}
  rest: Tree = {}
  for name, value in tree.items():
    if isinstance(value, dict):
      parts = split(value, labels[name], label)
      chosen |= {name: parts[0]} if parts[0] else {}
      rest |= {name: parts[1]} if parts[1] else {}
    else:
      (chosen if labels[name] == label else rest)[name] = value
  return chosen, rest


def join(a: Tree, b: Tree) -> Tree:
  """The inverse of `split`."""
  both = a | b
  for name in a.keys() & b.keys():
    both[name] = join(a[name], b[name])
  return both
