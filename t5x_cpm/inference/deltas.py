"""The deltas that an engine serves on one base, by name: which rows share a batch, and what lies on the devices meanwhile.

Deltas of one form (`tuning.slots`) lie side by side in the slots of one set of arrays, and one compiled program serves them
all: slot 0 belongs to rows without a delta. All deltas stay in host memory. Those that rows ask for are copied to slots, from
which the least recently used ones go first.
"""

import dataclasses
import functools
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from t5x_cpm import trees, tuning
from t5x_cpm.config import Config, ConfigError, template
from t5x_cpm.config.fields import did_you_mean, shown
from t5x_cpm.inference import programs, text
from t5x_cpm.infmoe import about
from t5x_cpm.models import stacks
from t5x_cpm.tuning import slots
from t5x_cpm.vocabularies import Vocabulary


class Found(NamedTuple):
  """A delta that was read and belongs to the base.

  Attributes:
    saved: what its files hold.
    codec: how texts become its inputs.
    template: how the fields of a line become a text, where its run was told.
  """

  saved: tuning.Saved
  codec: text.Codec
  template: template.Template | None


def codec_of(saved: tuning.Saved, vocabulary: Vocabulary, config: Config) -> text.Codec:
  """How texts become inputs of a delta on a base with this configuration."""
  # A delta written before its objective was noted there was trained on pairs, as every gin file for deltas says.
  task = dataclasses.replace(config.task, objective=saved.about.get('objective', 'pairs'),
                             target_form=saved.about.get('target_form', 'text'))
  return text.Codec(vocabulary, dataclasses.replace(config, task=task, delta=saved.config))


def unknown(name: Any, known: Sequence[str]) -> str:
  """What is wrong with the name of a delta that nobody gave."""
  listed = f'expected {", ".join(map(repr, known))}, or None for the base alone' if known else 'no deltas are loaded'
  near = did_you_mean(name, known) if isinstance(name, str) else ''
  return f'delta = {shown(name)}: {listed}.{near}'


def check_name(name: Any, taken: Sequence[str]) -> None:
  """Raises ConfigError for what is no name of a delta, or is one that another has."""
  if not isinstance(name, str) or not name.strip():
    raise ConfigError(f'the name of a delta is {shown(name)}: expected a text that is not empty.')
  if name in taken:
    raise ConfigError(f'two deltas have the name {name!r}: give each its own.')


class Reader:
  """Reads deltas, and refuses those of another base or vocabulary. Touches no device."""

  def __init__(self, model_dir: Any, step: int, vocabulary: Vocabulary, config: Config):
    """The base, its vocabulary and its configuration."""
    self._model_dir, self._step, self._vocabulary, self._config = model_dir, step, vocabulary, config
    self._fingerprint = functools.cache(lambda: about.weights(model_dir) or tuning.fingerprint(model_dir, step))

  def _check_base(self, saved: tuning.Saved, what: str) -> None:
    if self._config.delta.method:
      raise ConfigError(f'{self._model_dir} holds a delta itself ({self._config.delta.method}): {what} needs the model_dir of '
                        f'its base, which was {saved.about["base"]["model_dir"]}.')
    theirs = saved.about['base']
    if theirs['fingerprint'] != self._fingerprint():
      remedy = 'Give the base that it was trained on'
      for other in about.read_run(self._model_dir).steps:
        if other != self._step and tuning.fingerprint(self._model_dir, other) == theirs['fingerprint']:
          remedy = f'It was trained on step {other} of this base: give that step'
      raise ConfigError(f'{what} was trained on a base with the fingerprint {theirs["fingerprint"]} ({theirs["model_dir"]}); '
                        f'{self._model_dir} at step {self._step} has {self._fingerprint()}. {remedy}.')
    if saved.about['vocabulary'] != self._vocabulary.fingerprint:
      raise ConfigError(f'{what} was trained with another vocabulary ({saved.about["vocabulary"]}) than that of '
                        f'{self._model_dir} ({self._vocabulary.fingerprint}).')

  def read(self, name: str, path: Any, taken: Sequence[str] = ()) -> Found:
    """The delta in a folder, or in that of the run that trained it.

    Args:
      name: what it will be called.
      path: the folder.
      taken: names of others.

    Raises:
      ConfigError: the name is taken; there is no delta, or it is damaged, or it belongs to another base or vocabulary.
    """
    check_name(name, taken)
    saved = tuning.read(path)
    self._check_base(saved, f'the delta {name!r} ({path})')
    given = saved.about.get('inputs_template', '')
    return Found(saved, codec_of(saved, self._vocabulary, self._config),
                 template.parse(given, f'{path}: inputs_template') if given else None)


def _put(axes: Any, held: Any, one: Any, slot: jax.Array) -> Any:
  """The arrays with one delta in a slot; a stack of layers among them may be a tuple of its layers."""
  if isinstance(held, tuple):
    return tuple(_put(axes, layer, given, slot) for layer, given in zip(held, stacks.unstack(one), strict=True))
  if isinstance(held, dict):
    return {name: _put(axes[name], tree, one[name], slot) for name, tree in held.items()}
  return jax.lax.dynamic_update_index_in_dim(held, one.astype(held.dtype), slot, axes)


class Group:
  """Deltas of one form, as many of them on the devices as there are slots.

  Attributes:
    form: what they have in common.
    functions: what computes with them.
  """

  def __init__(self, form: slots.Form, config: Config, mesh: Any):
    """Makes a group without deltas, for a base with this configuration."""
    self.form, self._size = form, config.delta.slots
    self.functions = programs.build(dataclasses.replace(config, delta=form.config), mesh)
    self._leaves = trees.named(self.functions.model.leaves()['delta'])
    self._shardings = jax.tree.map(lambda x: x.sharding, self.functions.params['delta'])
    axes = trees.nested({name: leaf.axes.index('slot') for name, leaf in self._leaves.items()})
    self._put = jax.jit(functools.partial(_put, axes), out_shardings=self._shardings)
    self._room: dict[str, tuple[int, ...]] = {}
    self._slots: dict[str, int] = {}  # by name, the least recently used one first
    self.arrays: Any = None

  def _empty(self) -> Any:
    """Arrays of the shapes in which functions take them, with a slot for none and the others free."""
    def whole(name: str, leaf: Any) -> jax.ShapeDtypeStruct:
      shape, axis = list(self._room[name]), leaf.axes.index('slot')
      return jax.ShapeDtypeStruct((*shape[:axis], self._size + 1, *shape[axis:]), leaf.dtype)

    stored = self.functions.stored | {'delta': trees.nested({name: whole(name, leaf) for name, leaf in self._leaves.items()})}
    prepared = jax.eval_shape(self.functions.model.prepare, stored)['delta']
    return jax.tree.map(lambda x, sharding: jax.device_put(np.zeros(x.shape, x.dtype), sharding), prepared, self._shardings)

  def make_room(self, side: slots.Side) -> None:
    """Makes the arrays so wide that a delta fits in; only where they were not are functions compiled anew."""
    room = slots.room(side, self._leaves, self._room)
    if room != self._room:
      self._room, self._slots = room, {}
      self.arrays = self._empty()

  def forget(self, name: str) -> None:
    """Makes the slot of a delta free."""
    self._slots.pop(name, None)

  def place(self, wanted: Mapping[str, slots.Side]) -> dict[str, int]:
    """Brings deltas to the devices, no more than there are slots: the slot of each."""
    for name in wanted:
      if name in self._slots:
        self._slots[name] = self._slots.pop(name)  # now the last
    for name, side in wanted.items():
      if name in self._slots:
        continue
      free = set(range(1, self._size + 1)) - set(self._slots.values())
      slot = min(free) if free else self._slots.pop(next(iter(self._slots)))
      one = trees.nested(slots.filled_up(side.tensors, self._room))
      self.arrays = self._put(self.arrays, one, np.int32(slot))  # not in place: a stream may still read from the old arrays
      self._slots[name] = slot
    return {name: self._slots[name] for name in wanted}


class Deltas:
  """The deltas of an engine by name."""

  def __init__(self, program: programs.Program, reader: Reader, config: Config, mesh: Any):
    """None yet, on the base that a program computes with on a mesh."""
    self._program, self._reader, self._config, self._mesh = program, reader, config, mesh
    self._found: dict[str, Found] = {}
    self._sides: dict[str, slots.Side] = {}
    self._groups: dict[slots.Form, Group] = {}

  @property
  def names(self) -> tuple[str, ...]:
    """In the order in which they were added."""
    return tuple(self._found)

  @property
  def codecs(self) -> Mapping[str, text.Codec]:
    """How texts become the inputs of each."""
    return types.MappingProxyType({name: found.codec for name, found in self._found.items()})

  def add(self, name: str, path: Any) -> None:
    """Adds the delta in a folder. Errors are those of `Reader.read`, and ConfigError for tensors that do not fit."""
    found = self._reader.read(name, path, self.names)
    side = slots.beside(found.saved, self._config, f'the delta {name!r} ({path})')
    if side.form not in self._groups:
      self._groups[side.form] = Group(side.form, self._config, self._mesh)
    self._groups[side.form].make_room(side)
    self._found[name], self._sides[name] = found, side

  def remove(self, name: str) -> None:
    """Removes a delta. Raises ConfigError if there is none of this name."""
    if name not in self._found:
      raise ConfigError(f'remove_delta: {unknown(name, self.names)}')
    self._groups[self._sides[name].form].forget(name)
    del self._found[name], self._sides[name]

  def together(self, names: Sequence[str], size: int) -> Iterator[list[int]]:
    """Which rows share a batch: indices, of rows of one form with no more deltas than there are slots.

    Args:
      names: the delta of each row, '' for none. Such rows go with any others.
      size: the most rows of a batch.
    """
    forms = {name: self._sides[name].form for name in dict.fromkeys(names) if name}
    anywhere = next(iter(forms.values()), None)
    first = {name: number for number, name in enumerate(dict.fromkeys(names))}
    for form in dict.fromkeys(forms.values()) or [None]:
      mine = [row for row, name in enumerate(names) if forms.get(name, anywhere) == form]
      batch: list[int] = []
      for row in sorted(mine, key=lambda row: first[names[row]]):
        used = {names[other] for other in (*batch, row)} - {''}
        if len(batch) == size or len(used) > self._config.delta.slots:
          yield batch
          batch = []
        batch.append(row)
      if batch:
        yield batch

  def program(self, names: Sequence[str]) -> tuple[programs.Program, np.ndarray]:
    """What computes the rows of a batch, and the slot of each, int32 [B].

    Args:
      names: the delta of each row, '' for none; at least one, and as `together` gives them.
    """
    wanted = {name: self._sides[name] for name in names if name}
    group = self._groups[next(iter(wanted.values())).form]
    slot_of = group.place(wanted)
    return self._program.with_delta(group.functions, group.arrays), np.array([slot_of.get(name, 0) for name in names], np.int32)
