"""Prompt tuning (Lester et al. 2021; Zhang et al. 2021, section 5): vectors before the input of the encoder, and nothing else.

As tokens the vectors have the ids from ModelConfig.vocab_size on, so that batches, packing, relative positions and decoding
treat them like any others. (CPM-2 gives them negative ids.)
"""

import jax
import numpy as np
from etils import epath

from t5x_cpm.config import ConfigError, DeltaConfig, ModelConfig
from t5x_cpm.config.fields import one_line
from t5x_cpm.models.component import Weight
from t5x_cpm.tuning import files
from t5x_cpm.tuning.methods import Method, register
from t5x_cpm.vocabularies import Vocabulary

FREQUENT = 5000  # pieces of a vocabulary, whose first ids are the most frequent ones (Lester et al. 2021)


def make(config: DeltaConfig) -> Method:
  """The method 'prompt'."""

  def declared(model: ModelConfig) -> Weight:
    return Weight((1, config.vectors, model.d_model), ('slot', None, 'embed'),
                  lambda key, shape: jax.random.uniform(key, shape, minval=-0.5, maxval=0.5))

  sight = {'prompt_sees_text': config.prompt_sees_text, 'text_sees_prompt': config.text_sees_prompt}
  return Method(prompt=declared, alike={'prompt_length': 1, **sight})


def _sampled(count: int, vocabulary: Vocabulary, seed: int) -> list[list[int]]:
  """Tokens drawn from the FREQUENT first ids of a vocabulary, special ones apart, each as seldom as possible."""
  special = {vocabulary.pad_id, vocabulary.bos_id, vocabulary.eos_id, vocabulary.unk_id, *vocabulary.sentinels}
  frequent = np.array([token for token in range(min(FREQUENT, vocabulary.size)) if token not in special], np.int32)
  rng = np.random.default_rng(seed)
  rounds = -(-count // len(frequent))
  return np.concatenate([rng.permutation(frequent) for _ in range(rounds)])[:count, None].tolist()


def first_tokens(config: DeltaConfig, vocabulary: Vocabulary, seed: int) -> list[list[int]]:
  """For each vector of a prompt the tokens of whose embeddings it is the mean at first; [] where it is made of none.

  Args:
    config: `prompt_init` 'vocabulary' draws frequent tokens; 'words' takes the mean of each of `prompt_words`, and draws the
      rest; 'text' takes the tokens of `prompt_text`, from the start again where there are too few.
    vocabulary: of the base.
    seed: of the draw.

  Raises:
    ConfigError: a word or the text has no token.
  """
  if config.prompt_init == 'words':
    words = [vocabulary.encode(word) for word in config.prompt_words]
    if not all(words):
      empty = config.prompt_words[words.index([])]
      raise ConfigError(f'DeltaConfig.prompt_words: {empty!r} has no token in {vocabulary.spec}.')
    return words + _sampled(config.vectors - len(words), vocabulary, seed)
  if config.prompt_init == 'text':
    ids = vocabulary.encode(config.prompt_text)
    if not ids:
      raise ConfigError(f'DeltaConfig.prompt_text = {config.prompt_text!r} has no token in {vocabulary.spec}.')
    return np.resize(np.array(ids, np.int32), config.vectors)[:, None].tolist()
  return _sampled(config.vectors, vocabulary, seed) if config.prompt_init == 'vocabulary' else []


def from_file(config: DeltaConfig, d_model: int) -> np.ndarray | None:
  """The vectors [vectors, d_model] in DeltaConfig.prompt_file, of whatever base they were trained on; None where it names none.

  Raises:
    ConfigError: they cannot be read, or are more, fewer or of another width.
  """
  if config.prompt_init != 'file' or not config.vectors:
    return None
  name = f'DeltaConfig.prompt_file = {config.prompt_file!r}'
  if epath.Path(config.prompt_file).is_dir():
    found = files.read(config.prompt_file).tensors.get('prompt/table')
    if found is None:
      raise ConfigError(f'{name}: that delta has no prompt.')
  else:
    try:
      with epath.Path(config.prompt_file).open('rb') as file:
        found = np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
      raise ConfigError(f'{name} cannot be read as an array of NumPy, nor is it the folder of a delta '
                        f'({one_line(str(error))}).') from None
  if not isinstance(found, np.ndarray) or found.shape != (config.vectors, d_model):
    raise ConfigError(f'{name} has the shape {getattr(found, "shape", None)}; expected {(config.vectors, d_model)}, of '
                      f'{config.vectors} vectors of ModelConfig.d_model.')
  if not np.issubdtype(found.dtype, np.floating) or not np.isfinite(found).all():
    raise ConfigError(f'{name}: expected finite floating-point numbers.')
  return found.astype(np.float32)


register('prompt', make)
