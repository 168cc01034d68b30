"""Checks the types of configuration values, which dataclasses do not: of those that gin binds and those that Python sets."""

import dataclasses
import types
import typing
from typing import Any

from t5x_cpm.config.fields import ConfigError
from t5x_cpm.config.run import Config


def check_type(value: Any, kind: Any) -> Any:
  """The value, as a float where an int stands for one. Raises TypeError unless it is of the annotated type `kind`."""
  origin, arguments = typing.get_origin(kind), typing.get_args(kind)
  if kind is Any:
    return value
  if origin in (typing.Union, types.UnionType):
    for member in arguments:
      try:
        return check_type(value, member)
      except TypeError:
        continue
  elif origin is dict and isinstance(value, dict):
    return {check_type(k, arguments[0]): check_type(v, arguments[1]) for k, v in value.items()}
  elif origin is list and isinstance(value, list):
    return [check_type(item, arguments[0]) for item in value]
  elif origin is tuple and isinstance(value, (list, tuple)):
    if arguments[1:] == (Ellipsis,):
      arguments = arguments[:1] * len(value)
    if len(arguments) == len(value):
      return tuple(check_type(item, member) for item, member in zip(value, arguments))
  elif kind is float and isinstance(value, int) and not isinstance(value, bool):
    return float(value)
  elif isinstance(kind, type) and isinstance(value, kind) and (kind is bool or not isinstance(value, bool)):
    return value
  raise TypeError


def mismatch(name: str, value: Any, kind: Any) -> str:
  """The message about a value of the wrong type."""
  expected = 'True or False' if kind is bool else kind.__name__ if type(kind) is type else str(kind)
  return f'{name} = {value!r} is of type {type(value).__name__}; expected {expected}.'


def check_types(config: Any, cls: type = Config) -> None:
  """Raises ConfigError for the first field of a configuration, nested classes included, whose value is of the wrong type."""
  for name, kind in typing.get_type_hints(cls).items():
    value, full = getattr(config, name), f'{cls.__name__}.{name}'
    if dataclasses.is_dataclass(kind):
      assert isinstance(kind, type)
      if not isinstance(value, kind):
        raise ConfigError(f'{full} is of type {type(value).__name__}; expected {kind.__name__}.')
      check_types(value, kind)
      continue
    try:
      check_type(value, kind)
    except TypeError:
      raise ConfigError(mismatch(full, value, kind)) from None
