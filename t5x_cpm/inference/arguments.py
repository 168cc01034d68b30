"""What users hand to an engine, checked: a string is one text, wherever texts are expected."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

from t5x_cpm.config import Config, ConfigError
from t5x_cpm.config.fields import shown

_EXPECTED = 'expected a text, or a list of texts'


def _shown(value: Any) -> str:
  return f'{shown(value)} ({type(value).__name__})'


def _items(value: Any, name: str, expected: str) -> list[Any]:
  if isinstance(value, str | bytes | bytearray | memoryview) or not isinstance(value, Sequence):
    raise ConfigError(f'{name} = {_shown(value)}: {expected}.')
  return list(value)


def texts(value: Any, name: str) -> list[str]:
  """A list of texts, or one text, as a list of str.

  Args:
    value: what was given.
    name: what errors call it, such as 'generate: texts'.

  Raises:
    ConfigError: it is neither.
  """
  if isinstance(value, str):
    return [str(value)]
  given = _items(value, name, _EXPECTED)
  for number, text in enumerate(given):
    if not isinstance(text, str):
      raise ConfigError(f'{name}[{number}] = {_shown(text)}: expected a text.')
  return [str(text) for text in given]


def answer(value: Any, name: str) -> str | list[str]:
  """What stands for one input: a text, or a list of the texts of its blanks. Arguments and errors are those of `texts`."""
  return str(value) if isinstance(value, str) else texts(value, name)


def targets(inputs: Any, value: Any) -> tuple[list[str], list[str | list[str]]]:
  """The arguments of `score`, each as a list: a single input has a single target.

  Raises:
    ConfigError: they are no texts, or not one target for each input.
  """
  lines = texts(inputs, 'score: inputs')
  given = [value] if isinstance(inputs, str) else _items(
      value, 'score: targets', 'expected a list with a target for each input, because inputs is a list')
  if len(lines) != len(given):
    raise ConfigError(f'score: {len(lines)} inputs and {len(given)} targets: give one target for each input.')
  name = 'score: targets' if isinstance(inputs, str) else 'score: targets[{}]'
  return lines, [answer(one, name.format(number)) for number, one in enumerate(given)]


def choices(inputs: Any, value: Any) -> tuple[list[str], list[list[str | list[str]]]]:
  """The arguments of `choose`, each as a list: a single input has a single list of choices.

  Raises:
    ConfigError: they are no texts, not one list of choices for each input, or a list is empty.
  """
  lines = texts(inputs, 'choose: inputs')
  single = isinstance(inputs, str)
  given = [value] if single else _items(
      value, 'choose: choices', 'expected a list with a list of texts for each input, because inputs is a list')
  if len(lines) != len(given):
    raise ConfigError(f'choose: {len(lines)} inputs and {len(given)} lists of choices: give one list for each input.')
  result = []
  for number, options in enumerate(given):
    name = 'choose: choices' if single else f'choose: choices[{number}]'
    options = _items(options, name, 'expected a list of texts to choose from')
    if not options:
      raise ConfigError(f'{name} is empty: give at least one text to choose from.')
    result.append([answer(option, f'{name}[{place}]') for place, option in enumerate(options)])
  return lines, result


def delta_names(value: Any, count: int, name: str) -> list[str]:
  """The delta of each of some texts, '' for none.

  Args:
    value: None or a name, for all of them; or a list with one of these for each.
    count: how many texts there are.
    name: what errors call it, such as 'generate: delta'.

  Raises:
    ConfigError: it is neither.
  """
  expected = 'expected the name of a delta, None, or a list with one of these for each text'
  given = [value] * count if value is None or isinstance(value, str) else _items(value, name, expected)
  if len(given) != count:
    raise ConfigError(f'{name}: {len(given)} names for {count} texts: give one for each, or one for all.')
  for one in given:
    if one is not None and not isinstance(one, str):
      raise ConfigError(f'{name}: {_shown(one)}: {expected}.')
  return [one or '' for one in given]


def deltas(value: Any) -> dict[str, Any]:
  """Names and folders of deltas, as `load` takes them. Raises ConfigError unless it is a mapping or None."""
  if value is not None and not isinstance(value, Mapping):
    raise ConfigError(f'load: deltas = {_shown(value)}: expected a dict from names to folders.')
  return {name: folder(path, f'load: deltas[{name!r}]') for name, path in (value or {}).items()}


def folder(value: Any, name: str) -> str:
  """The path of a folder. Raises ConfigError if it is none."""
  if not isinstance(value, str | os.PathLike) or not os.fspath(value):
    raise ConfigError(f'{name} = {_shown(value)}: expected the path of a folder.')
  return str(os.fspath(value))


def is_set(value: Any, name: str) -> bool:
  """A switch. Raises ConfigError unless it is True or False."""
  if not isinstance(value, bool):
    raise ConfigError(f'{name} = {_shown(value)}: expected True or False.')
  return value


def one_text(value: Any, name: str) -> str:
  """One text. Raises ConfigError if it is anything else."""
  if not isinstance(value, str):
    raise ConfigError(f'{name} = {_shown(value)}: expected one text.')
  return str(value)


def check_load(step: Any, config: Any) -> None:
  """Raises ConfigError unless `load` was given the number of a step and a configuration, or None for either."""
  if step is not None and (isinstance(step, bool) or not isinstance(step, int)):
    raise ConfigError(f'load: step = {_shown(step)}: expected the number of a checkpoint.')
  if config is not None and not isinstance(config, Config):
    raise ConfigError(f'load: config = {_shown(config)}: expected a t5x_cpm.Config.')
