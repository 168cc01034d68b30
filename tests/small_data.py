"""Small vocabularies and caches for the tests of the data pipeline."""

import pathlib

import numpy as np

from t5x_cpm import vocabularies
from t5x_cpm.config import Config, TaskConfig, TrainConfig
from t5x_cpm.data import cache, reader
from t5x_cpm.tasks import caches

SPECIALS = ['<unk>', '<s>', '</s>', '\u2583', '<sep>', '<pad>', '<mask>', '<eod>', '\u2581', ',', '\u2582']
SENTINELS = 100


def vocabulary_file(folder: pathlib.Path) -> pathlib.Path:
  """A CPM-2 vocabulary of single characters."""
  path = pathlib.Path(folder) / 'vocab.txt'
  letters = [chr(c) for c in (*range(0x21, 0x7F), *range(0x4E00, 0x5200)) if chr(c) != ',']
  path.write_text('\n'.join(SPECIALS + letters + [f'<s_{i}>' for i in range(SENTINELS)]) + '\n', encoding='utf-8')
  return path


def make_config(folder: pathlib.Path, *, batch_size: int = 8, seed: int = 0, name: str = 'wiki_zh', **task) -> Config:
  """A configuration whose cache and vocabulary are in `folder`."""
  file = pathlib.Path(folder) / 'vocab.txt'
  if not file.is_file():
    vocabulary_file(folder)
  return Config(task=TaskConfig(name=name, vocabulary=f'cpm2:{file}', cache_dir=str(folder), **task),
                train=TrainConfig(batch_size=batch_size, seed=seed))


def write_cache(config: Config, vocabulary: vocabularies.Vocabulary, splits: dict, **facts) -> None:
  """Writes the cache of `config` from arrays: {split: {feature: (tokens, lengths)}}; facts as in `cache.finish`."""
  path = caches.directory(config)
  path.mkdir(parents=True, exist_ok=True)
  for split, features in splits.items():
    for feature, (tokens, lengths) in features.items():
      np.asarray(tokens, cache.token_dtype(vocabulary)).tofile(path / f'{split}.{feature}.tokens')
      np.asarray(lengths, np.uint32).tofile(path / f'{split}.{feature}.lengths')
  cache.finish(path, config.task.name, vocabulary, {
      split: {'documents': len(next(iter(features.values()))[1]),
              'tokens': {feature: int(np.sum(lengths)) for feature, (_, lengths) in features.items()}}
      for split, features in splits.items()}, list(next(iter(splits.values()))), **facts)


def fill(config: Config, splits: dict, checksum: str = 'x') -> vocabularies.Vocabulary:
  """Writes the cache of `config` from lists of documents: {split: {feature: [ids, ...]}}."""
  vocabulary = vocabularies.load(config.task.vocabulary)
  arrays = {split: {feature: (np.array([t for d in documents for t in d], np.int64), [len(d) for d in documents])
                    for feature, documents in features.items()} for split, features in splits.items()}
  write_cache(config, vocabulary, arrays, checksum=checksum)
  return vocabulary


def random_documents(rng: np.random.Generator, lengths) -> list[list[int]]:
  """Documents of ordinary ids."""
  return [rng.integers(20, 1000, n).tolist() for n in lengths]


def open_reader(config: Config, split: str, **options) -> reader.Reader:
  """A reader over the cache of `config`, which is made if it is not there."""
  return reader.open_reader(caches.build(config), config, split, **options)
