"""Converts models from and to transformers: folders that its `from_pretrained` reads and `save_pretrained` writes.

Parameters are converted in memory, in float32 unless the configuration of the run says otherwise.
"""

import json
import os
import pathlib
import shutil
import warnings
import zipfile
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from t5x_cpm import user_files, vocabularies
from t5x_cpm.checkpoints import arrays, huggingface, run_directory
from t5x_cpm.checkpoints.manager import Manager
from t5x_cpm.config import Config, ConfigError, TaskConfig
from t5x_cpm.models import encoder_decoder

SHARD_BYTES = 4 * 2**30
NO_PICKLE = ('is damaged or holds more than tensors, and is not opened: unpickling a file may run any program. Save the model '
             'as .safetensors.')


def read_tensors(folder: pathlib.Path) -> dict[str, np.ndarray]:
  """The tensors of a folder: .safetensors if there are any, otherwise .bin files of torch.

  Raises:
    ConfigError: there is neither, or only the latter and torch is not installed; a file is damaged, or a pickle holds more than
      tensors.
  """
  import safetensors.numpy

  result: dict[str, np.ndarray] = {}
  safe, binary = sorted(folder.glob('model*.safetensors')), sorted(folder.glob('pytorch_model*.bin'))
  for file in safe + binary * (not safe):
    user_files.check(file, str(file))
  for file in safe:
    try:
      result |= safetensors.numpy.load_file(file)
    except safetensors.SafetensorError as error:
      raise ConfigError(f'{file} is damaged: {error}.') from None
    except OSError as error:
      raise ConfigError(f'{file} cannot be read: {error.strerror or error}.') from None
    except (AttributeError, KeyError) as error:
      raise ConfigError(f'{file} has tensors of a type that NumPy lacks ({error}): save it in float32 or bfloat16.') from None
  if safe:
    return result
  if not binary:
    raise ConfigError(f'{folder} has no model*.safetensors and no pytorch_model*.bin.')
  try:
    import torch
  except ImportError:
    raise ConfigError(f'{binary[0]} needs torch to be read: pip install t5x_cpm[torch], or save it as .safetensors.') from None
  for file in binary:
    try:
      with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # of how the pickle is written
        # Only files in the form of version 1.6 and later can be mapped.
        loaded = torch.load(file, map_location='cpu', weights_only=True, mmap=zipfile.is_zipfile(file))
    except OSError:
      raise
    except Exception as error:  # whatever a pickle makes of it
      raise ConfigError(f'{file} {NO_PICKLE}') from error
    if not isinstance(loaded, dict) or not all(isinstance(value, torch.Tensor) for value in loaded.values()):
      raise ConfigError(f'{file} {NO_PICKLE}')
    for name, value in loaded.items():
      result[name] = (value.float() if value.dtype == torch.bfloat16 else value).numpy()
  return result


def _parts(pairs: Iterator[tuple[str, np.ndarray]], limit: int) -> Iterator[dict[str, np.ndarray]]:
  """Tensors in groups of at most `limit` bytes; a larger tensor is a group of its own."""
  part: dict[str, np.ndarray] = {}
  for name, value in pairs:
    if part and sum(other.nbytes for other in part.values()) + value.nbytes > limit:
      yield part
      part = {}
    part[name] = value
  yield part


def write_tensors(folder: pathlib.Path, pairs: Iterator[tuple[str, np.ndarray]], limit: int = SHARD_BYTES) -> None:
  """Writes .safetensors files of at most `limit` bytes (or one tensor) and their index."""
  import safetensors.numpy

  shards: list[dict[str, int]] = []
  for part in _parts(pairs, limit):
    safetensors.numpy.save_file(part, folder / f'part-{len(shards):05}', metadata={'format': 'pt'})
    shards.append({name: value.nbytes for name, value in part.items()})
    del part  # or it would stay in memory while the next is read
  if len(shards) == 1:
    (folder / 'part-00000').replace(folder / 'model.safetensors')
    return
  places: dict[str, str] = {}
  for index, shard in enumerate(shards):
    file = f'model-{index + 1:05}-of-{len(shards):05}.safetensors'
    (folder / f'part-{index:05}').replace(folder / file)
    places |= dict.fromkeys(shard, file)
  total = sum(sum(shard.values()) for shard in shards)
  index_json = {'metadata': {'total_size': total}, 'weight_map': places}
  (folder / 'model.safetensors.index.json').write_text(json.dumps(index_json, indent=2) + '\n')


def read_description(folder: pathlib.Path) -> dict[str, Any]:
  """The config.json of a folder. Raises ConfigError where it is missing or not a JSON object."""
  path = folder / 'config.json'
  if not os.path.lexists(path):
    raise ConfigError(f'--hf={folder}: there is no config.json in it.')
  return user_files.json_file(path, str(path))


def _vocabulary(folder: pathlib.Path, given: str) -> vocabularies.Vocabulary:
  """The vocabulary that is given, or what lies beside the weights."""
  if given:
    return vocabularies.load(given)
  if os.path.lexists(folder / 'vocabulary'):
    return vocabularies.load_saved(folder / 'vocabulary')
  if os.path.lexists(folder / 'spiece.model'):
    return vocabularies.load(f'sentencepiece:{folder / "spiece.model"}')
  raise ConfigError(f'--hf={folder} has no spiece.model and no vocabulary/: give --vocabulary=KIND:FILE, such as '
                    'sentencepiece:FILE.')


def from_huggingface(hf: str, model_dir: str, *, vocabulary: str = '', objective: str = '') -> None:
  """Writes a model_dir with a checkpoint of step 0 from a folder of transformers.

  Args:
    hf: folder with config.json and weights, .safetensors or pytorch_model*.bin.
    model_dir: a new directory.
    vocabulary: such as 'sentencepiece:FILE'; '' is what `to_huggingface` left in the folder, or else its spiece.model.
    objective: how the model was trained; '' is 't5', or 'isolated' for CPM vocabularies.

  Raises:
    ConfigError: the folder does not hold such a model, the vocabulary does not fit, or model_dir has a checkpoint.
  """
  folder = pathlib.Path(hf)
  described = read_description(folder)
  words = _vocabulary(folder, vocabulary)
  model, given = huggingface.head_to_ours(huggingface.read_config(described), read_tensors(folder))
  objective = objective or ('t5' if words.kind == 'sentencepiece' else 'isolated')
  config = Config(model=model, task=TaskConfig(name='imported', vocabulary=words.spec, objective=objective))
  config.validate()
  vocabularies.check_size(model, words)
  params = huggingface.to_params(model, given)
  with Manager(model_dir, config, info={'vocabulary': words.fingerprint}) as manager:
    if manager.latest_step() is not None:
      raise ConfigError(f'--model_dir={model_dir} has a checkpoint already: give a new directory.')
    words.save(pathlib.Path(model_dir) / 'vocabulary')
    axes = jax.tree.map(lambda leaf: leaf.axes, encoder_decoder.build(model).leaves())
    manager.save(0, {'step': jnp.int32(0), 'params': params}, axes={'step': (), 'params': axes})
  print(f'{model_dir}: a checkpoint of step 0 with {encoder_decoder.build(model).num_parameters():,} parameters, and the '
        f'vocabulary {words.spec} of {words.size:,} tokens; objective {objective!r}', flush=True)


def to_huggingface(model_dir: str, hf: str, *, step: int | None = None) -> None:
  """Writes what `T5ForConditionalGeneration.from_pretrained` reads, and the vocabulary beside it.

  Args:
    model_dir: the run's directory.
    hf: a new folder.
    step: the step of the checkpoint; by default the last.

  Raises:
    ConfigError: there is no such checkpoint, transformers has no such model, or the folder is not empty.
  """
  run, folder = run_directory.read_run(model_dir, step), pathlib.Path(hf)
  run_directory.check_is_model(model_dir, run.config)
  saved = pathlib.Path(model_dir) / 'vocabulary'
  words = vocabularies.load_saved(saved)
  run_directory.check_vocabulary(model_dir, run.info, words.fingerprint)
  described = huggingface.write_config(run.config.model) | {
      'pad_token_id': words.pad_id, 'eos_token_id': words.eos_id, 'decoder_start_token_id': words.bos_id}
  with run_directory.writing(folder):
    if folder.exists() and any(folder.iterdir()):
      raise ConfigError(f'--hf={hf} is not empty: give a new directory.')
    folder.mkdir(parents=True, exist_ok=True)
    (folder / 'config.json').write_text(json.dumps(described, indent=2) + '\n')
    write_tensors(folder, huggingface.from_params(run.config.model, arrays.load_params(model_dir, step=run.step)))
    shutil.copytree(saved, folder / 'vocabulary')
    if words.kind == 'sentencepiece':  # where transformers' tokenizer looks for it
      shutil.copyfile(saved / pathlib.Path(words.files[0]).name, folder / 'spiece.model')
  print(f'{hf}: {encoder_decoder.build(run.config.model).num_parameters():,} parameters of step {run.step}, in '
        f'{", ".join(sorted(file.name for file in folder.iterdir()))}', flush=True)
