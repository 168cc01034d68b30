"""Makes SeqIO tasks and mixtures from the rows of the tables. Imports TensorFlow."""

import collections
import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import seqio
import tensorflow as tf

from t5x_cpm import vocabularies
from t5x_cpm.config import Config, ConfigError
from t5x_cpm.tasks import documents, metrics, pretrain, seqio_vocabulary, sources
from t5x_cpm.tasks.table import Row

MOST_SHARDS = 512  # the most shards of a split that a cache is made of


def _seqio_name(name: str, version: Any) -> str:
  version = version if isinstance(version, str) else version.fingerprint
  digest = hashlib.blake2b(f'{name}\0{version}'.encode(), digest_size=4).hexdigest()
  return ''.join(c if c.isalnum() else '_' for c in name) + '__' + digest


def _tfds_source(row: Row) -> tuple[seqio.DataSource, list[Callable]]:
  import tensorflow_datasets as tfds

  try:
    builder = tfds.builder(row.source)
  except tfds.core.DatasetNotFoundError as error:
    reason = str(error).splitlines()[0]
    raise ConfigError(f'TaskConfig.name = {row.name!r}: TFDS has no builder {row.source!r} ({reason}).') from None
  if not builder.info.splits:
    try:
      builder.download_and_prepare()
    except Exception as error:  # the network, a missing package, a full disk: TFDS has no common class for these
      raise ConfigError(f'TaskConfig.name = {row.name!r}: {row.source!r} is not in {builder.data_dir} and could not be '
                        f'prepared ({type(error).__name__}: {str(error).strip().splitlines()[0][:200]}). Make it with '
                        f'`tfds build {row.source}`, or set TFDS_DATA_DIR to where it is.') from error
  info = builder.info
  features: Any = info.features
  texts = [name for name, feature in features.items() if isinstance(feature, tfds.features.Text)]
  field = row.field or ('text' if 'text' in texts else texts[0] if len(texts) == 1 else '')
  if not field:
    raise ConfigError(f'TaskConfig.name = {row.name!r}: the builder has the text features {texts}, not one of them "text".')
  splits = dict(row.splits) or {name: name for name in ('train', 'validation') if name in info.splits}
  if not splits or splits['train'] not in info.splits:
    raise ConfigError(f'TaskConfig.name = {row.name!r}: the builder has the splits {sorted(info.splits)}; name one of them, as '
                      f'in tfds:{row.source}@SPLIT.')
  if set(splits) == {'train'}:
    train = splits['train']
    splits = ({'train': train, 'validation': f'{train}-validation'} if f'{train}-validation' in info.splits else
              {'train': f'{train}[:99%]', 'validation': f'{train}[99%:]'})

  def select(example):
    text = example[field]
    for pattern, replacement in pretrain.CLEAN.get(info.name, ()):
      text = tf.strings.regex_replace(text, pattern, replacement)
    return {'targets': text}

  name = f'{info.name}/{info.config_name}' if info.config_name else info.name
  return seqio.TfdsDataSource(f'{name}:{info.version}', splits=splits), [lambda dataset: dataset.map(select)]


def task(row: Row, source: documents.Documents | None, vocabulary: vocabularies.Vocabulary) -> seqio.Task:
  """Makes the SeqIO task of a row: source -> text features -> ids, without an end of document, which the objective adds.

  Args:
    row: a row of a table.
    source: its documents; None if they come from TFDS.
    vocabulary: makes the ids.
  """
  if source is None:
    data, preprocessors = _tfds_source(row)
    fields = ['targets']
  else:
    data, preprocessors, fields = sources.TextSource(source), [], source.features
  adapter = seqio_vocabulary.SeqioVocabulary(vocabulary)
  features = {name: seqio.Feature(adapter, add_eos=False) for name in fields}
  name = _seqio_name(row.name, vocabulary)
  made = seqio.Task(name, data, features, [*preprocessors, sources.tokenize(vocabulary, fields)],
                    metric_fns=[getattr(metrics, metric) for metric in row.metrics] if 'inputs' in fields else [])
  seqio.TaskRegistry.remove(name)
  seqio.TaskRegistry.add_provider(name, made)
  return made


def mixture(name: str, tasks: Sequence[tuple[seqio.Task, float]]) -> seqio.Mixture:
  """Makes a SeqIO mixture of tasks that have been made, each with its rate."""
  return seqio.Mixture(_seqio_name(name, '+'.join(made.name for made, _ in tasks)), [(made.name, rate) for made, rate in tasks])


def registered(name: str) -> Any:
  """A task or mixture that another module registered with SeqIO."""
  return seqio.get_mixture_or_task(name)


def vocabulary_of(provider: Any, config: Config) -> vocabularies.Vocabulary:
  """The vocabulary of a task that another module registered.

  Raises:
    ConfigError: it is of a kind that t5x_cpm does not know, or differs from TaskConfig.vocabulary.
  """
  name = config.task.name
  theirs = provider.output_features['targets'].vocabulary
  own: vocabularies.Vocabulary | None = None
  if isinstance(theirs, seqio_vocabulary.SeqioVocabulary):
    own = theirs.vocabulary
  elif isinstance(theirs, seqio.SentencePieceVocabulary):
    own = vocabularies.load(f'sentencepiece:{theirs.sentencepiece_model_file}?extra_ids={theirs.extra_ids}')
  given = vocabularies.load(config.task.vocabulary) if config.task.vocabulary else None
  if own is None and given is None:
    raise ConfigError(f'task {name!r} uses {type(theirs).__name__}, which is not known here: set TaskConfig.vocabulary to '
                      "the same ids, for example 'sentencepiece:FILE'.")
  if own is not None and given is not None and own.fingerprint != given.fingerprint:
    raise ConfigError(f'TaskConfig.vocabulary = {given.spec!r}, but task {name!r} makes its ids with {own.spec!r}: leave '
                      'TaskConfig.vocabulary empty, or use the same.')
  chosen = own or given
  assert chosen
  return chosen


class TaskTokens:
  """The tokens of any SeqIO task, as a `documents.Source`.

  Raises:
    ConfigError: the task has no targets, or a feature that is not a sequence of integers.
  """

  files: Sequence[str] = ()
  patterns: Sequence[str] = ()

  def __init__(self, made: seqio.Task, name: str):
    self.task, self.name = made, name
    self.features = [feature for feature in ('inputs', 'targets') if feature in made.output_features]
    if 'targets' not in self.features:
      raise ConfigError(f'task {name!r} has the features {sorted(made.output_features)}: expected targets, or inputs and '
                        'targets.')
    for feature in self.features:
      kind = made.output_features[feature]
      if kind.rank != 1 or not kind.dtype.is_integer:
        raise ConfigError(f'task {name!r}: feature {feature!r} has rank {kind.rank} and type {kind.dtype.name}, expected a '
                          'sequence of integers.')
    self.shards = {split: min(len(made.source.list_shards(split)), MOST_SHARDS) for split in made.splits}

  def tokens(self, split: str, shard: int, vocabulary: vocabularies.Vocabulary,
             skipped: collections.Counter) -> Iterator[list[documents.Side]]:
    """The tokens of a shard in batches: for each feature the flat ids and the lengths, without end of sequence."""
    del skipped
    shards = self.shards[split]
    tf.random.set_seed(0)  # for preprocessors that draw random numbers; a FunctionDataSource may not take a seed
    seed = None if isinstance(self.task.source, seqio.FunctionDataSource) else 0
    dataset = self.task.get_dataset(None, split, shuffle=False, seed=seed, trim_output_features=False,
                                    shard_info=seqio.ShardInfo(shard, shards) if shards > 1 else None)
    dataset = dataset.map(lambda example: {feature: example[feature] for feature in self.features})
    for batch in dataset.ragged_batch(documents.BATCH):
      yield [self._clean(batch[feature], vocabulary) for feature in self.features]

  def _clean(self, ragged, vocabulary: vocabularies.Vocabulary) -> documents.Side:
    flat, lengths = ragged.flat_values.numpy(), ragged.row_lengths().numpy()
    if len(flat) and not 0 <= flat.min() <= flat.max() < vocabulary.size:
      raise ConfigError(f'task {self.name!r} gives the ids {flat.min()} to {flat.max()}, but its vocabulary '
                        f'{vocabulary.spec!r} has {vocabulary.size}: set TaskConfig.vocabulary to the one that the task uses.')
    last = np.cumsum(lengths) - 1
    ends = (lengths > 0) & (flat[last] == vocabulary.eos_id) if len(flat) else np.zeros(len(lengths), bool)
    return np.delete(flat, last[ends]), lengths - ends
