"""Tensors in memory, for the tests of formats."""

import pathlib
from typing import Any

import jax
import numpy as np

from t5x_cpm import trees
from t5x_cpm.checkpoints import huggingface, readers, safetensors_files
from t5x_cpm.config import ModelConfig
from t5x_cpm.models import encoder_decoder


class Arrays:
  """A TensorReader of arrays."""

  def __init__(self, arrays: dict[str, np.ndarray]):
    self.arrays = arrays
    self.kinds = {name: readers.Kind(value.shape, value.dtype) for name, value in arrays.items()}

  def read(self, name: str, index: tuple[int, ...] = ()) -> np.ndarray:
    return self.arrays[name][index]

  def place(self, name: str) -> str:
    return 'memory'


def params_of(source: Any) -> Any:
  """All parameters of a source, such as huggingface.Source."""
  result = {}
  for leaf in source.leaves.values():
    value = result[leaf.name] = np.empty(leaf.shape, leaf.dtype)
    for index in np.ndindex(*leaf.shape[:len(leaf.stacked)]):
      value[index] = source.read(leaf, index)
  return trees.nested(result)


def to_params(config: ModelConfig, given: dict[str, np.ndarray]) -> tuple[ModelConfig, Any]:
  """The model and its parameters, from the tensors of transformers."""
  source = huggingface.Source(config, Arrays(given))
  return source.config, params_of(source)


def from_params(config: ModelConfig, params: Any) -> dict[str, np.ndarray]:
  """The tensors of transformers."""
  named = trees.named(params)
  return {part.name: np.asarray(named[part.leaf.name])[part.at].T if part.transposed else
          np.asarray(named[part.leaf.name])[part.at] for part in huggingface.exported(config)}


def random_params(config: ModelConfig, seed: int = 0) -> Any:
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(leaf.dtype), encoder_decoder.build(config).abstract()[0])


def write(folder: pathlib.Path, tensors: dict[str, np.ndarray], limit: int = 1 << 30) -> None:
  """Writes .safetensors files."""
  safetensors_files.write(folder, Arrays(tensors).kinds, tensors.__getitem__, '', limit)


def read(folder: pathlib.Path) -> dict[str, np.ndarray]:
  """All tensors of a folder of transformers."""
  reader = readers.open_folder(folder)
  return {name: reader.read(name) for name in reader.kinds}
