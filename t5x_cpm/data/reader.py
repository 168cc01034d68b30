"""(config, seed, step) -> a batch: any step at once, and the same rows for any number of processes.

Its number alone leads to the tokens of a row: the mixture says which row of which task's stream it is, and that stream,
a component, says what is in it. What is drawn at random is a hash of (seed, task, epoch, piece).
"""

import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from t5x_cpm.config import Config, ConfigError, row_features
from t5x_cpm.data import cache as cache_lib
from t5x_cpm.data import objectives, packing
from t5x_cpm.data.pairs import Pairs
from t5x_cpm.data.pieces import Continuations, Pieces
from t5x_cpm.data.rows import FIXED_SEED, Component, RowSegments
from t5x_cpm.data.streams import Windows
from t5x_cpm.vocabularies import Vocabulary

Batch = dict[str, np.ndarray]
EVERY = slice(None)  # every row of a batch
COMPONENTS: dict[str, type[Component]] = {  # by objective
    'isolated': Pieces, 't5': Pieces, 'cpm2': Windows, 'prefix_lm': Continuations, 'pairs': Pairs}
_TOKENS = {'encoder': {'encoder_tokens': 'encoder_input_tokens'},
           'decoder': {'decoder_inputs': 'decoder_input_tokens', 'decoder_targets': 'decoder_target_tokens'}}


def assemble(found: list[RowSegments], rows: int, room: tuple[int, int], pad: int, unpredicted: int | None,
             first_vector: int | None = None) -> Batch:
  """Puts segments into rows, one after another on each side, with positions that begin anew in each.

  Args:
    found: the segments of each component; `row` is the row of the batch.
    rows: how many rows the batch has.
    room: encoder and decoder slots of a row.
    pad: the token of empty slots; their segment and weight are 0.
    unpredicted: a decoder input after which nothing is predicted, or None.
    first_vector: that and all greater decoder inputs are vectors of a prompt, after which nothing is predicted; None: none are.

  Returns:
    The features of a batch, int32 [rows, slots], and float32 loss weights.
  """
  row = np.concatenate([one.row for one in found]) if found else np.zeros(0, np.int64)
  new = np.ones(len(row), bool)
  new[1:] = row[1:] != row[:-1]
  first = np.maximum.accumulate(np.where(new, np.arange(len(row)), 0)) if len(row) else row
  number = (np.arange(len(row)) - first + 1).astype(np.int32)
  batch: Batch = {}
  for side, slots in zip(('encoder', 'decoder'), room):
    lengths = np.concatenate([getattr(one.segments, f'{side}_lengths') for one in found]) if found else row
    begin = objectives.exclusive_cumsum(lengths)
    column = begin - (begin[first] if len(row) else begin)
    position = objectives.ramp(lengths)
    where = np.repeat(row * slots + column, lengths) + position

    def put(name, values, empty=0, where=where, slots=slots):
      out = np.full(rows * slots, empty, np.int32)
      out[where] = values
      batch[name] = out.reshape(rows, slots)

    for name, feature in _TOKENS[side].items():
      put(feature, np.concatenate([getattr(one.segments, name) for one in found]) if found else row, pad)
    put(f'{side}_segment_ids', np.repeat(number, lengths))
    put(f'{side}_positions', position)
  weights = (batch['decoder_segment_ids'] > 0).astype(np.float32)
  if unpredicted is not None:
    weights[batch['decoder_input_tokens'] == unpredicted] = 0.0
  if first_vector is not None:
    weights[batch['decoder_input_tokens'] >= first_vector] = 0.0
  batch['decoder_loss_weights'] = weights
  return batch


class EmptySplitError(ConfigError):
  """A task has no document in a split."""


class Reader:
  """Batches of one split. See the head of this file; made by `open_reader`.

  Attributes:
    vocabulary: the vocabulary of the tokens.
    fingerprint: what the batches are a function of, for JSON: a run may be resumed only with an equal one.
    rows_per_epoch: how many rows hold everything once, all components together.
    without: which tasks of a mixture have no row in the split, in words.
  """

  def __init__(self, config: Config, split: str, vocabulary: Vocabulary, components: list[Component], rates: dict[str, float],
               carried: list[dict[str, int]], without: Sequence[str] = ()):
    """Takes, as `carried`, what the rows of each component carry beside their tokens (config.row_features)."""
    self.carried_by_component = {name: np.array([row[name] for row in carried], np.int32) for name in carried[0]}
    self.vocabulary, self.split, self.components, self.without = vocabulary, split, components, list(without)
    self.config, self.task, self.seed, self.batch_size = config, config.task, config.train.seed, config.train.batch_size
    self.room = (self.task.encoder_length, self.task.decoder_length)
    self.unpredicted = vocabulary.eos_id if self.task.objective == 'cpm2' else None
    self.first_vector = config.model.vocab_size if config.delta.vectors else None
    self.mixer = packing.Mixer(packing.rate_counts(rates), self.seed)
    self.rows_per_epoch = float(sum(component.rows_per_epoch for component in components))
    self.fingerprint: dict[str, Any] = {
        'tasks': [{'name': component.name, 'checksum': component.checksum, 'rows_of_period': int(count)}
                  for component, count in zip(components, self.mixer.counts)],
        'split': split, 'objective': self.task.objective, 'encoder_length': self.room[0], 'decoder_length': self.room[1],
        'noise_density': self.task.noise_density, 'mean_span_length': self.task.mean_span_length, 'seed': self.seed,
        'batch_size': self.batch_size, 'vocabulary': vocabulary.fingerprint}
    for component in components:
      self.fingerprint |= component.rules

  def batch(self, step: int, rows: slice | np.ndarray = EVERY) -> Batch:
    """The batch of a step, or some of its rows: always the same for the same (config, seed, step).

    Args:
      step: the number of the step, from 0.
      rows: which of the TrainConfig.batch_size rows of the global batch.

    Returns:
      encoder_input_tokens, encoder_segment_ids, encoder_positions [rows, encoder_length], decoder_input_tokens,
      decoder_target_tokens, decoder_segment_ids, decoder_positions, decoder_loss_weights [rows, decoder_length]; and
      int32 [rows] for each of config.row_features that the configuration needs.
    """
    mine = np.arange(self.batch_size)[rows]
    component, stream_row = self.mixer.locate(mine + step * self.batch_size)
    return self._make(component, stream_row, len(mine), lambda stream, rows: stream.read(rows, self.seed))

  def components_of(self, step: int, rows: slice | np.ndarray = EVERY) -> np.ndarray:
    """Which of `components` the rows of the batch of a step are of: int [rows]."""
    return self.mixer.locate(np.arange(self.batch_size)[rows] + step * self.batch_size)[0]

  def eval_batches(self, max_batches: int = 0, rows: slice | np.ndarray = EVERY) -> Iterator[Batch]:
    """Each row of the split once, in an order and with masks that depend on nothing but the data.

    Args:
      max_batches: stop after this many; 0 is all. The order is random, so that any number of batches is a fair sample.
      rows: which rows of each batch, ascending.

    Yields:
      Batches, or these rows of them; the last one is filled up with empty rows of weight 0.
    """
    counts = np.array([component.rows_once for component in self.components])
    total = int(counts.sum())
    batches = -(-total // self.batch_size)
    for number in range(min(batches, max_batches) if max_batches else batches):
      mine = number * self.batch_size + np.arange(self.batch_size)[rows]
      row = packing.permute(mine[mine < total], total, objectives.combine(FIXED_SEED))
      component = np.searchsorted(np.cumsum(counts), row, side='right')
      stream_row = row - objectives.exclusive_cumsum(counts)[component]
      yield self._make(component, stream_row, len(mine), lambda stream, rows: stream.read_once(rows))

  def _make(self, component: np.ndarray, stream_row: np.ndarray, rows: int, read) -> Batch:
    found = []
    for number in np.unique(component):
      mine = np.flatnonzero(component == number)
      row, segments = read(self.components[number], stream_row[mine])
      found.append(RowSegments(mine[row], segments))
    batch = assemble(found, rows, self.room, self.vocabulary.pad_id, self.unpredicted, self.first_vector)
    for name, value in self.carried_by_component.items():
      batch[name] = np.resize(value[component], rows)  # in empty rows the value does not matter
    return batch

  def statistics(self) -> dict:
    """Sizes, and how well rows are filled.

    Returns:
      pieces, rows_per_epoch, encoder_efficiency and decoder_efficiency (share of slots used), tokens_per_row (both sides),
      and the same for each task under 'tasks', with what was left out.
    """
    tasks, share = {}, self.mixer.counts / self.mixer.counts.sum()
    for component, rate in zip(self.components, share):
      summary, rows = component.summarize(), component.rows_per_epoch
      used = (summary['encoder_slots_used'], summary['decoder_slots_used'])
      tasks[component.name] = {
          **summary, 'rows_per_epoch': rows, 'share_of_rows': float(rate),
          'encoder_efficiency': used[0] / (rows * self.room[0]), 'decoder_efficiency': used[1] / (rows * self.room[1]),
          'tokens_per_row': sum(used) / rows}
    mean = {name: float(sum(task[name] * task['share_of_rows'] for task in tasks.values()))
            for name in ('encoder_efficiency', 'decoder_efficiency', 'tokens_per_row')}
    return {'pieces': sum(task['pieces'] for task in tasks.values()), 'rows_per_epoch': self.rows_per_epoch, **mean,
            'tasks': tasks}


def open_reader(path: pathlib.Path, config: Config, split: str, *, vocabulary: Vocabulary | None = None,
                row: Mapping[str, int] | None = None) -> Reader:
  """Opens a split of the task that `config` names.

  Args:
    path: the folder of the task's cache, as `tasks.caches.build` returns it.
    config: `task`, `local_task` and `train` (seed, batch_size) are read.
    split: 'train' or 'validation'.
    vocabulary: that of the model that will read the batches; None is the cache's.
    row: what rows carry beside tokens where their task does not decide; None: in training the task must decide, and
      elsewhere the defaults of the configuration hold.

  Raises:
    EmptySplitError: the task has no such split, or no document in it.
    ConfigError: a task of a mixture has nothing to train on, the objective does not fit the task, the vocabulary is another
      one, or the mixture does not decide what its rows carry.
  """
  config.task.validate()
  caches = cache_lib.components(path)
  own = caches[0][1].vocabulary()
  if vocabulary is not None and vocabulary.fingerprint != own.fingerprint:
    raise ConfigError(f'task {config.task.name!r} was tokenized with {own.spec!r}, but the model uses {vocabulary.spec!r}: set '
                      'TaskConfig.vocabulary to the vocabulary of the model.')
  components: list[Component] = []
  rates: dict[str, float] = {}
  carried: list[dict[str, int]] = []
  without: list[str] = []
  otherwise = row_features.defaults(config) if row is None and split != 'train' else row
  rows = [row_features.of_task(config, number, len(caches), otherwise) for number in range(len(caches))]
  for carries, (rate, cache) in zip(rows, caches, strict=True):
    if split not in cache.splits:
      if split == 'train' and len(caches) > 1:
        raise ConfigError(f'task {cache.name!r} of the mixture {config.task.name!r} has no split {split!r} to train on: leave '
                          'it out.')
      without.append(f'{cache.name} has no such split')
      continue
    if ('inputs' in cache.features) != (config.task.objective == 'pairs'):
      what, wanted = (('inputs and targets', "'pairs'") if 'inputs' in cache.features else
                      ('text only', "'isolated', 'cpm2', 't5' or 'prefix_lm'"))
      raise ConfigError(f'TaskConfig.objective = {config.task.objective!r}, but task {cache.name!r} has {what}: expected '
                        f'{wanted}.')
    component = COMPONENTS[config.task.objective](cache, split, config, own)
    if not component.rows_per_epoch:
      if split == 'train':
        raise ConfigError(f'task {cache.name!r} has no document to train on: {component.describe()}.')
      without.append(f'{cache.name} has nothing to read: {component.describe()}')
      continue
    components.append(component)
    rates[cache.name] = rate
    carried.append(carries)
  if not components:
    left_out = f' ({"; ".join(without)})' if any(split in cache.splits for _, cache in caches) else ''
    raise EmptySplitError(f'task {config.task.name!r} has no documents in split {split!r}{left_out}; for files of your own set '
                          'LocalTaskConfig.validation_files, or a larger validation_fraction.')
  return Reader(config, split, own if vocabulary is None else vocabulary, components, rates, carried, without)
