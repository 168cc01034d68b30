"""A model on its way from a source to what is wanted: what every growth takes, and what it gives."""

import dataclasses
import functools
import zlib
from collections.abc import Callable, Mapping

import jax
import numpy as np

from t5x_cpm.checkpoints.tensors import Index
from t5x_cpm.config import ModelConfig
from t5x_cpm.models import encoder_decoder
from t5x_cpm.models.leaf import Leaf
from t5x_cpm.vocabularies import Vocabulary

Read = Callable[[Leaf, Index], np.ndarray]  # (parameter, index of a slice) -> the slice


@dataclasses.dataclass(frozen=True)
class Stage:
  """A model on its way from the source to what is wanted.

  Attributes:
    model: its configuration.
    words: its vocabulary.
    read: its parameters.
    told: what became of parameters, by name, for those that are not as in the source.
    kept: what is kept of the function that the source computes, a sentence for each growth.
    others: further sources of the same model and vocabulary, as long as no growth has made one model of all.
  """

  model: ModelConfig
  words: Vocabulary
  read: Read
  told: dict[str, str] = dataclasses.field(default_factory=dict)
  kept: tuple[str, ...] = ()
  others: tuple['Stage', ...] = ()

  @functools.cached_property
  def leaves(self) -> dict[str, Leaf]:
    """The parameters by name."""
    return {leaf.name: leaf for leaf in jax.tree.leaves(encoder_decoder.build(self.model).leaves())}

  def then(self, model: ModelConfig, read: Read, told: Mapping[str, str], kept: str) -> 'Stage':
    """The next stage, with the same vocabulary; `told` and `kept` are added to what was told before."""
    joined = {name: '; '.join(text for text in (self.told.get(name), told.get(name)) if text) for name in {**self.told, **told}}
    return Stage(model, self.words, read, joined, (*self.kept, kept))


def gives_output(leaf: Leaf) -> bool:
  """Whether it is the last matrix of a sublayer: its rows belong to heads or to hidden units, and zeros there give nothing."""
  return leaf.axes[len(leaf.stacked):][:1] in (('heads',), ('mlp',))


def generator(seed: int, name: str, index: Index) -> np.random.Generator:
  """Random numbers of a slice, which depend on nothing else."""
  return np.random.default_rng([seed, zlib.crc32(name.encode()), *index])


def with_noise(value: np.ndarray, share: float, rng: np.random.Generator) -> np.ndarray:
  """A slice plus noise of so large a share of its standard deviation."""
  return value + share * value.std() * rng.standard_normal(value.shape, np.float32)
