"""Deltas side by side in the slots of one array, so that each row of a batch may have its own.

Deltas of one form share a batch. Their ranks and lengths may differ: an axis that belongs to the method alone is filled up with
zeros, to the next of a few sizes, so that a delta can take the place of another in a compiled program.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from t5x_cpm import trees
from t5x_cpm.config import Config, ConfigError, DeltaConfig
from t5x_cpm.config.fields import shown
from t5x_cpm.tuning import methods
from t5x_cpm.tuning.files import Saved, fitted
from t5x_cpm.tuning.methods import METHODS

LEAST = 8  # the smallest size of an axis that is filled up

Tensors = Mapping[str, np.ndarray]
Shapes = Mapping[str, tuple[int, ...]]


class Form(NamedTuple):
  """What deltas that share a batch have in common.

  Attributes:
    config: the configuration of the methods that compute with them.
    is_loose: whether their sizes may differ in axes without a name.
  """

  config: DeltaConfig
  is_loose: bool


class Side(NamedTuple):
  """A delta that can lie beside others of its form.

  Attributes:
    form: what it has in common with them.
    tensors: by name, without the axis of slots, as the methods of `form.config` compute with them.
  """

  form: Form
  tensors: Tensors


def form(config: DeltaConfig) -> Form:
  """What a delta of this configuration has in common with those that share its batch."""
  fields: dict[str, Any] = {}
  for name in config.methods:
    alike = METHODS[name](config).alike
    if alike is None:
      usual = DeltaConfig()
      return Form(dataclasses.replace(config, base='', base_dtype=usual.base_dtype, slots=usual.slots), False)
    fields |= alike
  return Form(DeltaConfig(method=config.method, **fields), True)


def beside(saved: Saved, config: Config, what: str) -> Side:
  """A delta, ready to lie beside others.

  Args:
    saved: the delta.
    config: of its base.
    what: what errors call the delta.

  Raises:
    ConfigError: nobody registered its method; its tensors are not those that its configuration declares for the base; it acts
      in the matrices of experts, which multiply tokens of all rows together; or it has parameters of the base as its own.
  """
  leaves = methods.leaves(config.model, saved.config)
  fitted(saved.tensors, leaves, what)
  fields = [field for field in ('modules_to_save', 'token_ids') if getattr(saved.config, field)]
  if any('expert' in leaf.axes for leaf in trees.named(leaves).values()):
    fields.append('sites')  # of experts
  if fields:
    raise ConfigError(f'{what} was trained with DeltaConfig.{fields[0]} = {shown(getattr(saved.config, fields[0]))}: such a '
                      'delta cannot share a batch with others. Give its run as --model_dir, or merge it into its base.')
  common = form(saved.config)
  if not common.is_loose:
    return Side(common, saved.tensors)
  made = {name: METHODS[name](saved.config) for name in saved.config.methods}
  sites: dict[str, dict[str, np.ndarray]] = {}
  for name, tensor in saved.tensors.items():
    place, _, weight = name.rpartition('/')
    sites.setdefault(place, {})[weight] = tensor
  tensors: dict[str, np.ndarray] = {}
  for place, weights in sites.items():
    method = made.get(place.rpartition('/')[2])
    folded = method.folded(weights) if method else weights
    tensors |= {f'{place}/{weight}': tensor for weight, tensor in folded.items()}
  return Side(common, tensors)


def room(side: Side, leaves: Mapping[str, Any], before: Shapes) -> dict[str, tuple[int, ...]]:
  """Shapes, by name and without the axis of slots, that have room for a delta.

  Args:
    side: the delta.
    leaves: by name the Leaf of each of its tensors, in a model of its form.
    before: shapes that had room for the deltas before it; {}: there were none.
  """
  shapes = {}
  for name, tensor in side.tensors.items():
    axes = [axis for axis in leaves[name].axes if axis != 'slot']
    sizes = [max(LEAST, 1 << (size - 1).bit_length()) if axis is None and side.form.is_loose else size
             for axis, size in zip(axes, tensor.shape, strict=True)]
    shapes[name] = tuple(map(max, sizes, before.get(name, sizes)))
  return shapes


def filled_up(tensors: Tensors, shapes: Shapes) -> dict[str, np.ndarray]:
  """The tensors, with zeros at the end of each axis up to given shapes."""
  return {name: np.pad(tensor, [(0, wide - size) for wide, size in zip(shapes[name], tensor.shape, strict=True)])
          for name, tensor in tensors.items()}
