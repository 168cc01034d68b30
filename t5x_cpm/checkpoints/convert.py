"""Models of others as checkpoints of step 0: folders of transformers, and the files that CPM-2 was published in.

Parameters pass through memory slice by slice. What is written lies in DIR.partial until it is complete, and the same command
goes on where it was killed.
"""

import os
import pathlib
from collections.abc import Iterable
from typing import Any, Protocol

import numpy as np

from t5x_cpm import user_files, vocabularies
from t5x_cpm.checkpoints import cpm2, huggingface, readers, run_directory
from t5x_cpm.checkpoints.tensors import TensorWriter, check_room
from t5x_cpm.config import Config, ConfigError, ModelConfig, TaskConfig
from t5x_cpm.models.leaf import Leaf


class Source(Protocol):
  """Whose parameters are carried over."""

  @property
  def config(self) -> ModelConfig:
    """Of the model."""
    ...

  @property
  def leaves(self) -> dict[str, Leaf]:
    """Its parameters by name."""
    ...

  def read(self, leaf: Leaf, index: readers.Index) -> np.ndarray:
    """A slice of a parameter."""
    ...


def read_description(folder: pathlib.Path) -> dict[str, Any]:
  """The config.json of a folder. Raises ConfigError where it is missing or not a JSON object."""
  path = folder / 'config.json'
  if not os.path.lexists(path):
    raise ConfigError(f'{folder}: there is no config.json in it.')
  return user_files.json_file(path, str(path))


def _vocabulary(folder: pathlib.Path, given: str) -> vocabularies.Vocabulary:
  """The vocabulary that is given, or what lies beside the weights."""
  if given:
    return vocabularies.load(given)
  if os.path.lexists(folder / 'vocabulary'):
    return vocabularies.load_saved(folder / 'vocabulary')
  if os.path.lexists(folder / 'spiece.model'):
    return vocabularies.load(f'sentencepiece:{folder / "spiece.model"}')
  raise ConfigError(f'{folder} has no spiece.model and no vocabulary/: give --vocabulary=KIND:FILE, such as '
                    'sentencepiece:FILE.')


def _files(paths: Iterable[pathlib.Path]) -> list[list[Any]]:
  """By which a changed file is told, without reading it."""
  return [[path.name, about.st_size, about.st_mtime_ns] for path in sorted(paths) if (about := path.stat())]


def _write(source: Source, words: vocabularies.Vocabulary, objective: str, model_dir: str, made_from: Any) -> None:
  """Writes the run directory of a model."""
  folder = run_directory.new(model_dir, 'DIR')
  config = Config(model=source.config, task=TaskConfig(name='imported', vocabulary=words.spec, objective=objective))
  config.validate()
  vocabularies.check_size(source.config, words)
  leaves = source.leaves.values()
  check_room(folder, 0.9 * sum(leaf.size * np.dtype(leaf.dtype).itemsize for leaf in leaves), 'the model')
  with TensorWriter(folder, config, {'vocabulary': words.fingerprint}, leaves, made_from) as writer:
    words.save(writer.partial / 'vocabulary')
    writer.fill(source.read, 'convert')
  print(f'{model_dir}: a checkpoint of step 0 with {sum(leaf.size for leaf in leaves):,} parameters, and the vocabulary '
        f'{words.spec} of {words.size:,} tokens; objective {objective!r}', flush=True)


def from_huggingface(source: str, model_dir: str, *, vocabulary: str = '', objective: str = '') -> None:
  """Writes a model_dir with a checkpoint of step 0 from a folder of transformers.

  Args:
    source: folder with config.json and weights, .safetensors or pytorch_model*.bin.
    model_dir: a new directory.
    vocabulary: such as 'sentencepiece:FILE'; '' is what `to_huggingface` left in the folder, or else its spiece.model.
    objective: how the model was trained; '' is 't5', or 'isolated' for CPM vocabularies.

  Raises:
    ConfigError: the folder does not hold such a model, the vocabulary does not fit, or something is in model_dir.
  """
  folder = pathlib.Path(source)
  described = read_description(folder)
  words = _vocabulary(folder, vocabulary)
  found = huggingface.Source(huggingface.read_config(described), readers.open_folder(folder))
  made_from = _files(path for path in folder.iterdir() if path.suffix in ('.safetensors', '.bin'))
  _write(found, words, objective or ('t5' if words.kind == 'sentencepiece' else 'isolated'), model_dir, made_from)


def from_cpm2(source: str, model_dir: str, *, vocabulary: str, objective: str = '') -> None:
  """Writes a model_dir with a checkpoint of step 0 from the files that CPM-2 was published in.

  Args:
    source: folder with the parts of an iteration, or with folders of iterations.
    model_dir: a new directory.
    vocabulary: such as 'cpm2:vocab.txt'.
    objective: how the model was trained; '' is 'isolated'.

  Raises:
    ConfigError: the files do not hold such a model as a whole, or the vocabulary does not fit, or something is in model_dir.
  """
  if not vocabulary:
    raise ConfigError('convert cpm2 needs --vocabulary=cpm2:FILE: the vocab.txt that was published beside the weights.')
  words = vocabularies.load(vocabulary)
  found = cpm2.Source(pathlib.Path(source))
  rows = found.config.vocab_size
  if not 0 <= rows - words.size < vocabularies.PADDING:
    raise ConfigError(f'{found.files[0, 0].parent}: the embedding tables of the {found.degree} parts have {rows} rows, but the '
                      f'vocabulary {words.spec} has {words.size} pieces: it is another one, or parts are missing.')
  _write(found, words, objective or 'isolated', model_dir, _files(found.files.values()))
