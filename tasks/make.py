"""SeqIO tasks and mixtures from the rows of the tables. Imports TensorFlow."""

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import seqio
import tensorflow as tf

from t5x_cpm.config import Config, ConfigError
from t5x_cpm.data import seqio_vocabulary
from t5x_cpm.data import vocabulary as vocabulary_lib
from t5x_cpm.tasks import local, metrics, pretrain, quickstart, sources, text_files
from t5x_cpm.tasks.table import Row

NAMES: dict[str, str] = {}  # of SeqIO, which allows few characters -> of TaskConfig.name


def task(row: Row, config: Config, vocabulary: vocabulary_lib.Vocabulary) -> seqio.Task:
  """Makes the SeqIO task of a row: source -> text features -> ids. No end of document: the objective adds it."""
  pairs = row.pairs or (row.kind == 'local' and config.task.objective == 'pairs')
  fields = ('inputs', 'targets') if pairs else ('targets',)
  source, preprocessors = _SOURCES[row.kind](row, config, fields)
  adapter = seqio_vocabulary.SeqioVocabulary(vocabulary)
  features = {name: seqio.Feature(adapter, add_eos=False) for name in fields}
  name = _seqio_name(row.name, vocabulary)
  made = seqio.Task(name, source, features, [*preprocessors, sources.tokenize(vocabulary, fields)],
                    metric_fns=[getattr(metrics, metric) for metric in row.metrics] if pairs else [])
  seqio.TaskRegistry.remove(name)
  seqio.TaskRegistry.add_provider(name, made)
  return made


def mixture(name: str, parts: Sequence[tuple[seqio.Task, float]]) -> seqio.Mixture:
  """Makes a SeqIO mixture of tasks that are made."""
  return seqio.Mixture(_seqio_name(name, '+'.join(part.name for part, _ in parts)), [(part.name, rate) for part, rate in parts])


def _seqio_name(name: str, version: Any) -> str:
  version = version if isinstance(version, str) else version.fingerprint
  digest = hashlib.blake2b(f'{name}\0{version}'.encode(), digest_size=4).hexdigest()
  made = ''.join(c if c.isalnum() else '_' for c in name) + '__' + digest
  NAMES[made] = name
  return made


def registered(name: str) -> Any:
  """A task or mixture that another module registered with SeqIO."""
  return seqio.get_mixture_or_task(name)


def vocabulary_of(provider: Any, config: Config) -> vocabulary_lib.Vocabulary:
  """The vocabulary of a task that another module registered.

  Raises:
    ConfigError: it is of a kind that t5x_cpm does not know, or another than TaskConfig.vocabulary.
  """
  name = config.task.name
  theirs = provider.output_features['targets'].vocabulary
  own = None
  if isinstance(theirs, seqio_vocabulary.SeqioVocabulary):
    own = theirs.vocabulary
  elif isinstance(theirs, seqio.SentencePieceVocabulary):
    own = vocabulary_lib.load(f'sentencepiece:{theirs.sentencepiece_model_file}?extra_ids={theirs.extra_ids}')
  given = vocabulary_lib.load(config.task.vocabulary) if config.task.vocabulary else None
  if own is None and given is None:
    raise ConfigError(f'task {name!r} uses {type(theirs).__name__}, which is not known here: set TaskConfig.vocabulary to '
                      "the same ids, for example 'sentencepiece:FILE'.")
  if own is not None and given is not None and own.fingerprint != given.fingerprint:
    raise ConfigError(f'TaskConfig.vocabulary = {given.spec!r}, but task {name!r} makes its ids with {own.spec!r}: leave '
                      'TaskConfig.vocabulary empty, or use the same.')
  return given if own is None else own


def _quickstart_source(row: Row, config: Config, fields: Sequence[str]) -> tuple[seqio.DataSource, list[Callable]]:
  del config

  def read(split, shard, skipped):
    return quickstart.documents(row.source, split)

  return sources.TextSource(read, {'train': 1, 'validation': 1}, fields, quickstart.files(row.source)), []


def _local_source(row: Row, config: Config, fields: Sequence[str]) -> tuple[seqio.DataSource, list[Callable]]:
  part = local.part(row.name, config.local_task)
  pairs = len(fields) == 2
  assert isinstance(part.files, str) and isinstance(part.validation_files, str)
  files = {'train': local.find(part.files, 'files', pairs)}
  if part.validation_files:
    files['validation'] = local.find(part.validation_files, 'validation_files', pairs)
  elif part.validation_fraction:
    files['validation'] = files['train']
  ranges = {split: text_files.ranges(paths, part.text_document) for split, paths in files.items()}
  if not ranges['train']:
    raise ConfigError(f'LocalTaskConfig.files = {part.files!r}: every file that matches is empty.')
  names = (part.inputs_field, part.targets_field) if pairs else (part.text_field,)

  def read(split, shard, skipped):
    for document in text_files.read(*ranges[split][shard], part, names, skipped):
      if part.validation_files or text_files.held_out(document, part.validation_fraction) == (split == 'validation'):
        yield document

  patterns = [pattern for pattern in (part.files, part.validation_files) if pattern]
  shards = {split: len(found) for split, found in ranges.items() if found}
  return sources.TextSource(read, shards, fields, sorted(set(sum(files.values(), []))), patterns), []


def _tfds_source(row: Row, config: Config, fields: Sequence[str]) -> tuple[seqio.DataSource, list[Callable]]:
  del config
  import tensorflow_datasets as tfds
  try:
    info = tfds.builder(row.source).info
  except tfds.core.DatasetNotFoundError as error:
    reason = str(error).splitlines()[0]
    raise ConfigError(f'TaskConfig.name = {row.name!r}: TFDS has no builder {row.source!r} ({reason}).') from None
  texts = [name for name, feature in info.features.items() if isinstance(feature, tfds.features.Text)]
  field = row.field or ('text' if 'text' in texts else texts[0] if len(texts) == 1 else '')
  if not field:
    raise ConfigError(f'TaskConfig.name = {row.name!r}: the builder has the text features {texts}, not one of them "text".')
  splits = dict(row.splits) or {name: name for name in ('train', 'validation') if name in info.splits}
  if set(splits) == {'train'}:
    splits = {'train': 'train[:99%]', 'validation': 'train[99%:]'}
  if not splits:
    raise ConfigError(f'TaskConfig.name = {row.name!r}: the builder has the splits {sorted(info.splits)}; name one of them, as '
                      f'in {row.name}@SPLIT.')

  def select(example):
    text = example[field]
    for pattern, replacement in pretrain.CLEAN.get(info.name, ()):
      text = tf.strings.regex_replace(text, pattern, replacement)
    return {fields[0]: text}

  name = f'{info.name}/{info.config_name}' if info.config_name else info.name
  return seqio.TfdsDataSource(f'{name}:{info.version}', splits=splits), [lambda dataset: dataset.map(select)]


_SOURCES = {'quickstart': _quickstart_source, 'local': _local_source, 'tfds': _tfds_source}
