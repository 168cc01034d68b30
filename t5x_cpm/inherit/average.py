"""Several trained models become one."""

from collections.abc import Sequence

import numpy as np

from t5x_cpm.checkpoints.tensors import Index, indices
from t5x_cpm.config import Config, ConfigError
from t5x_cpm.inherit.stage import Read, Stage
from t5x_cpm.models.leaf import Leaf
from t5x_cpm.vocabularies import Vocabulary


def mean(sources: Sequence[Stage]) -> Read:
  """The mean of each parameter, in at least float32; of equal ones it is what each of them is, bit for bit."""

  def read(leaf: Leaf, index: Index) -> np.ndarray:
    first = sources[0].read(leaf, index)
    found = first.astype(np.promote_types(first.dtype, np.float32) if first.dtype.kind == 'f' else np.float32)
    for number, source in enumerate(sources[1:], 2):
      found += (source.read(leaf, index) - found) / number
    return found.astype(first.dtype)

  return read


def average(stage: Stage, config: Config, words: Vocabulary) -> Stage:
  """The mean of several models, such as the last checkpoints of one run (Wortsman et al. 2022, "Model soups")."""
  sources = stage, *stage.others
  for leaf in stage.leaves.values():
    if leaf.update == 'fixed':  # never trained, so it is the same along a run, and its mean over several is worth nothing
      for index in indices(leaf):
        first = stage.read(leaf, index)
        if not all(np.array_equal(first, other.read(leaf, index)) for other in stage.others):
          raise ConfigError(f'--source: {leaf.name} is drawn once and never trained, and it differs between the sources: their '
                            'experts are not the same ones, and have no mean. Give checkpoints that come from one run.')
  told = {name: f'the mean of {len(sources)}' for name in stage.leaves}
  return stage.then(stage.model, mean(sources), told, f'average: the function is that of none of the {len(sources)} sources.')
