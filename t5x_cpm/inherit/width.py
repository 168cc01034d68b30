"""Growth in width: more hidden units in feed-forward networks, more heads of attention."""

import dataclasses

import numpy as np

from t5x_cpm.checkpoints.tensors import Index
from t5x_cpm.config import Config, ConfigError
from t5x_cpm.inherit.stage import Stage, generator, gives_output, with_noise
from t5x_cpm.models.leaf import Leaf
from t5x_cpm.vocabularies import Vocabulary

FIELDS = ('d_ff', 'num_heads')


def _widened(value: np.ndarray, axis: int, size: int, leaf: Leaf) -> np.ndarray:
  """A slice with so many rows along an axis: those that are new copy old ones, or give nothing.

  Copies of a hidden unit share its output among them (Net2Net, Chen et al. 2016). New heads have an output of 0 instead.
  """
  old = value.shape[axis]
  rows = np.arange(size) % old
  value = value.take(rows, axis)
  if gives_output(leaf) and 'mlp' in leaf.axes:
    shares = 1 / np.bincount(rows)[rows]
    return (value * shares.reshape([-1 if i == axis else 1 for i in range(value.ndim)])).astype(value.dtype)
  if gives_output(leaf):
    value[(slice(None),) * axis + (slice(old, None),)] = 0
  return value


def widen(stage: Stage, config: Config, words: Vocabulary) -> Stage:
  """New hidden units are copies of old ones, and new heads copies whose output is 0."""
  model, noise, seed = stage.model, config.inherit.widen_noise, config.inherit.seed
  for field in FIELDS:
    if getattr(config.model, field) < getattr(model, field):
      raise ConfigError(f'ModelConfig.{field} = {getattr(config.model, field)}: the source has {getattr(model, field)}, and '
                        "InheritConfig.growth with 'widen' only adds to it.")
  new = dataclasses.replace(model, **{field: getattr(config.model, field) for field in FIELDS})
  if new == model:
    raise ConfigError("InheritConfig.growth has 'widen', but ModelConfig.d_ff and num_heads are those of the source: say what "
                      'they are to be.')
  old = stage.leaves

  def read(leaf: Leaf, index: Index) -> np.ndarray:
    before = old[leaf.name]
    value = stage.read(before, index)
    # The table of relative positions has a column for each head, the other matrices several rows or columns.
    for axis, (size, was) in enumerate(zip(leaf.shape[len(index):], value.shape, strict=True)):
      if size != was:
        value = _widened(value, axis, size, leaf)
        if noise and {'mlp', 'heads'} & set(leaf.axes) and not gives_output(leaf):
          added = (slice(None),) * axis + (slice(was, None),)
          value[added] = with_noise(value[added], noise, generator(seed, leaf.name, index))
    return value

  told = {leaf.name: f'{old[leaf.name].shape[axis]} of {size} as in the source'
          for leaf in Stage(new, words, read).leaves.values()
          for axis, size in enumerate(leaf.shape) if size != old[leaf.name].shape[axis]}
  kept = 'the function is that of the source.' if not noise or new.d_ff == model.d_ff else (
      'the function changes, by the noise on copies of hidden units.')
  return stage.then(new, read, told, f'widen: {kept}')
