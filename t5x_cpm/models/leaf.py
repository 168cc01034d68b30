"""The description of one array of parameters: made once, by the model, for all that stores, splits, counts or trains it."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

STACKED = ('layers', 'expert')  # leading axes along which an array is a stack of weights


@dataclasses.dataclass(frozen=True)
class Leaf:
  """One array of parameters.

  Attributes:
    name: its path, such as 'encoder/layers/attention/query'.
    shape, dtype: of the whole array, stacks included.
    axes: the logical name of each axis (mesh.RULES), None for one that is never split.
    stack: 'encoder' or 'decoder'; '' for what belongs to neither.
    update: how it changes in training: by 'gradient', by a 'rule' of its own after each step, or not at all ('fixed').
    decays: whether weight decay applies to it.
    casts: whether it may be held in the type of computation where it is not trained.
  """

  name: str
  shape: tuple[int, ...]
  dtype: Any
  axes: tuple[str | None, ...]
  stack: str = ''
  update: str = 'gradient'
  decays: bool = True
  casts: bool = True

  @property
  def stacked(self) -> tuple[str, ...]:
    """What it is a stack over, outermost first: (), ('layers',) or ('layers', 'expert')."""
    count = next((i for i, axis in enumerate(self.axes) if axis not in STACKED), len(self.axes))
    return tuple(axis for axis in self.axes[:count] if axis)

  @property
  def has_gradient(self) -> bool:
    return self.update == 'gradient'

  @property
  def size(self) -> int:
    """How many numbers it holds."""
    return math.prod(self.shape)

  @property
  def abstract(self) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(self.shape, jnp.dtype(self.dtype))
