"""Objective 'pairs': inputs and targets as they are, several pairs in a row.

Where inputs have places for a prompt, the cache has the id after the vocabulary's last one as a mark in each of them, so that
one cache serves prompts of all lengths. Inputs without such places have a prompt before them.
"""

import functools
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from t5x_cpm import stored
from t5x_cpm.config import Config, ConfigError
from t5x_cpm.data import cache as cache_lib
from t5x_cpm.data import index, objectives
from t5x_cpm.data.blocks import Numbers
from t5x_cpm.data.objectives import Segments
from t5x_cpm.data.rows import Packed, in_words
from t5x_cpm.vocabularies import Vocabulary

MOST_CLASSES = 2048  # how many sizes are classes of their own


def _sides(inputs_D: np.ndarray, targets_D: np.ndarray, room: tuple[int, int], marks: int) -> Iterator[
    tuple[np.ndarray, np.ndarray]]:
  """The lengths [n, 2] of both sides, in chunks: as they are, and as cut; the marks in inputs are not counted.

  Inputs are cut to leave a slot for their end of sequence. Targets that do not fit with theirs fill the row without it, and so
  are as long as the row: the model is not taught that they end where they were cut.
  """
  for begin in range(0, len(inputs_D), index.CHUNK):
    end = begin + index.CHUNK
    sides = np.stack([inputs_D[begin:end], targets_D[begin:end]], axis=1).astype(np.int64) - np.array([marks, 0])
    yield sides, np.minimum(sides, np.array(room) - np.array([1, 0]))


def _slots(kept: np.ndarray, room: tuple[int, int]) -> np.ndarray:
  """The slots [n, 2] of sides of these lengths as cut, the end of sequence included where there is one."""
  return np.minimum(kept + 1, room)


def _size_classes(counts: np.ndarray, room: tuple[int, int], most: int) -> tuple[np.ndarray, np.ndarray]:
  """Makes classes of sizes: the `most` most frequent stay exact and the others are rounded up, so that packing stays quick.

  Args:
    counts: [encoder slots, decoder slots] how many pairs have each size.
    room: encoder and decoder slots of a row.
    most: how many sizes stay exact.

  Returns:
    The size of each class [C, 2], and the class of each size, of the shape of `counts`.
  """
  used = np.argwhere(counts)
  rare = np.ones(len(used), bool)
  rare[np.argsort(-counts[tuple(used.T)], kind='stable')[:most]] = False
  step = np.maximum(np.array(room) // 32, 1)
  rounded = np.where(rare[:, None], np.minimum(-(-used // step) * step, room), used)
  sizes, class_of = np.unique(rounded, axis=0, return_inverse=True)
  classes = np.zeros(counts.shape, np.int64)
  classes[tuple(used.T)] = class_of.reshape(-1)
  return sizes, classes


def _chunks(inputs_D: np.ndarray, targets_D: np.ndarray, room: tuple[int, int], marks: int,
            classes: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """Chunks of pairs, as `index.sort_by_class` takes them."""
  first = np.zeros(2, np.int64)
  for sides, kept in _sides(inputs_D, targets_D, room, marks):
    whole = sides + np.array([marks, 0])
    start = first + np.cumsum(whole, axis=0) - whole
    first = first + whole.sum(axis=0)
    read = np.where([marks > 0, False], whole, kept)  # what is cut from inputs with marks is known when they are read
    yield classes[tuple(_slots(kept, room).T)], np.concatenate([start, read], axis=1)


def _make_table(prefix: pathlib.Path, *, name: str, inputs_D: np.ndarray | Numbers, targets_D: np.ndarray | Numbers,
                room: tuple[int, int], marks: int, most_classes: int) -> dict:
  inputs_D, targets_D = np.asarray(inputs_D), np.asarray(targets_D)
  exact = np.zeros((room[0] + 1, room[1] + 1), np.int64)
  truncated, cut = 0, np.zeros(2, np.int64)
  for sides, kept in _sides(inputs_D, targets_D, room, marks):
    is_cut = sides >= room
    truncated, cut = truncated + int(is_cut.any(axis=1).sum()), cut + is_cut.sum(axis=0)
    slots = _slots(kept, room)
    exact += np.bincount(slots[:, 0] * (room[1] + 1) + slots[:, 1], minlength=exact.size).reshape(exact.shape)
  sizes, classes = _size_classes(exact, room, most_classes)
  chunks = functools.partial(_chunks, inputs_D, targets_D, room, marks, classes)
  counts = index.sort_by_class(prefix, chunks, len(sizes), columns=4)
  return {'name': name, 'sizes': sizes.tolist(), 'counts': counts.tolist(), 'truncated': truncated, 'cut': cut.tolist()}


def _is_size(value: Any) -> bool:
  return not stored.mismatch(value, [stored.COUNT]) and len(value) == 2


def table(directory: pathlib.Path, split: str, inputs_D: np.ndarray | Numbers, targets_D: np.ndarray | Numbers,
          room: tuple[int, int], most_classes: int = MOST_CLASSES, source: str = '', marks: int = 0) -> dict:
  """The pairs of a split by size: `members` holds the first token of both sides and their lengths as cut to fit.

  Inputs with marks have their whole length there, because the marks stay when their text is cut.

  Sizes count an end of sequence on each side, but for targets that are cut: those have as many tokens as the row.

  Args:
    directory: the folder of the tables of a cache.
    split: 'train' or 'validation'.
    inputs_D: tokens of the inputs of each pair, marks included.
    targets_D: tokens of the targets of each pair.
    room: encoder and decoder slots of a row that are left for texts and their ends.
    most_classes: how many sizes are classes of their own.
    source: as in `index.store`.
    marks: how many marks inputs have.

  Returns:
    {'name': the name of the table, 'sizes': [C, 2], 'counts': [C], 'truncated': pairs that had to be cut, 'cut': how many
    inputs and how many targets}.
  """
  name = f'{split}.pairs-{room[0]}-{room[1]}-open'  # without this word earlier versions ended cut targets
  name += f'-{marks}-marks' if marks else ''
  make = functools.partial(_make_table, name=name, inputs_D=inputs_D, targets_D=targets_D, room=room, marks=marks,
                           most_classes=most_classes)
  return index.store(directory, name, make, {'name': (name,), 'sizes': [_is_size], 'counts': [stored.COUNT],
                                             'truncated': stored.COUNT, 'cut': _is_size}, source)


class Pairs(Packed):
  """Rows of pairs: nothing is masked, each side has an end, and what does not fit is cut off.

  The end is an end of sequence; or, where TaskConfig.target_form is 'span', the targets stand between the first two sentinels,
  and the first ends the inputs. Targets that were cut have no end, and all that is left of them counts in the loss. Inputs that
  were cut have one, as those that inference cuts, and all their places for a prompt.
  """

  def __init__(self, cache: cache_lib.Cache, split: str, config: Config, vocabulary: Vocabulary):
    super().__init__(cache, split, config, vocabulary)
    prompts, self.marks = config.delta.prompts, config.marks
    self.parts = config.delta.parts or (0,) * self.marks
    self.first_vector, self.decoder_prompts = config.model.vocab_size, config.delta.vectors - prompts
    self.is_span = config.task.target_form == 'span'
    # Slots of a pair beside its texts and their ends.
    self.around = np.array([prompts, self.decoder_prompts + int(self.is_span)])
    self.text_room = (self.room[0] - prompts, self.room[1] - int(self.around[1]))
    if self.decoder_prompts and self.text_room[1] < 4:
      raise ConfigError(f'DeltaConfig.decoder_prompt_length = {self.decoder_prompts} leaves {self.text_room[1]} of '
                        f'TaskConfig.decoder_length = {self.room[1]} tokens for the targets: set a longer decoder_length, or a '
                        'shorter prompt.')
    if prompts and self.text_room[0] < 4:
      field = 'lengths' if config.delta.lengths else 'prompt_length'
      raise ConfigError(f'DeltaConfig.{field} = {getattr(config.delta, field)} leaves {self.text_room[0]} of '
                        f'TaskConfig.encoder_length = {self.room[0]} tokens for the inputs: set a longer encoder_length, or a '
                        'shorter prompt.')
    found = table(self.folder, split, cache.lengths(split, 'inputs'), cache.lengths(split, 'targets'), self.text_room,
                  source=cache.identity, marks=self.marks)
    self.left_out, self.facts = 0, {'truncated': found['truncated'], 'cut': tuple(found['cut'])}
    if found['cut'][1]:
      self.rules = {'cut_targets': 'without an end of sequence; earlier versions gave them one'}
    self._pack(np.array(found['sizes'], np.int64).reshape(-1, 2) + self.around, np.array(found['counts'], np.int64),
               index.load(self.folder, found['name'], 'members', np.int64, columns=4))

  def describe(self) -> str:
    """See the base class."""
    cut = [f', the {side} of {number:,} cut to {self.text_room[place] - 1 + place:,} tokens'
           for place, (side, number) in enumerate(zip(('inputs', 'targets'), self.facts['cut'])) if number]
    return in_words(self.cache.info['splits'][self.split], 'pair', after=''.join(cut))

  def _slots_used(self) -> np.ndarray:
    """Counted from the pairs themselves, because the sizes of classes may be rounded up."""
    used = np.zeros(2, np.int64)
    for i in range(0, len(self.members), index.CHUNK):
      kept = np.minimum(self.members[i:i + index.CHUNK][:, 2:] - np.array([self.marks, 0]), self.text_room)
      used += _slots(kept, self.text_room).sum(axis=0)
    return used + self.around * len(self.members)

  def _inputs(self, start: np.ndarray, length: np.ndarray, end: int) -> tuple[np.ndarray, np.ndarray]:
    """The inputs of pairs, from where they lie in the cache, with their prompts and ends, and their lengths."""
    tokens, mark = self.tokens['inputs'][objectives.ranges(start, length)].astype(np.int32), self.vocabulary.size
    if self.marks:
      is_text = tokens != mark
      number = np.cumsum(is_text)  # of the token in the texts of all pairs, from 1
      first = objectives.exclusive_cumsum(length)
      before = np.repeat((number - is_text)[first], length)
      tokens, length = objectives.select(tokens, length, ~is_text | (number - before < self.text_room[0]))
    elif self.parts:
      tokens, length = objectives.prepend(tokens, length, mark)
    tokens, length = objectives.append(tokens, length, end)
    return objectives.expand(tokens, length, mark, self.parts, self.first_vector) if self.parts else (tokens, length)

  def _with_decoder_prompt(self, tokens: np.ndarray, length: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    marked, longer = objectives.prepend(tokens, length, self.vocabulary.size)
    first = self.first_vector + int(self.around[0])
    return objectives.expand(marked, longer, self.vocabulary.size, (self.decoder_prompts,), first)

  def _segments(self, members: np.ndarray, class_ids: np.ndarray, keys: np.ndarray) -> Segments:
    del class_ids, keys
    eos, sentinels = self.vocabulary.eos_id, self.sentinels
    inputs, inputs_length = self._inputs(members[:, 0], members[:, 2], int(sentinels[0]) if self.is_span else eos)
    targets, targets_length = objectives.append(self.tokens['targets'][objectives.ranges(members[:, 1], members[:, 3])],
                                                members[:, 3], int(sentinels[1]) if self.is_span else eos)
    cut = members[:, 3] == self.text_room[1]
    targets = np.delete(targets, (np.cumsum(targets_length) - 1)[cut])
    targets_length = targets_length - cut
    if self.is_span:
      targets, targets_length = objectives.prepend(targets, targets_length, int(sentinels[0]))
    shifted = objectives.shift_right(targets, targets_length, self.vocabulary.bos_id)
    if self.decoder_prompts:
      shifted, _ = self._with_decoder_prompt(shifted, targets_length)
      targets, targets_length = self._with_decoder_prompt(targets, targets_length)
      targets[targets >= self.first_vector] = self.vocabulary.pad_id  # nothing is predicted after a vector
    return Segments(inputs_length, inputs, targets_length, shifted, targets)
