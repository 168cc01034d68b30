"""Checks the types of configuration values, which dataclasses do not: of those that gin binds and those that Python sets."""

import dataclasses
import math
import types
import typing
from typing import Any

from t5x_cpm.config.fields import ConfigError, shown

LARGEST = 2**63 - 1  # what NumPy and JAX take for a whole number
# What errors call a type; by default its name. The fields of the last one name files or folders.
_EXPECTED: dict[Any, str] = {bool: 'True or False', str | dict[str, str]: 'one path, or a dict of name -> path'}


def _plain(value: Any, kind: type) -> Any:
  """A value of `kind`, without the class that may be derived from it, whose repr() gin could not read."""
  if kind is float:
    try:
      number = float(value)
    except OverflowError:  # a whole number of hundreds of digits
      number = math.inf
    if not math.isfinite(number):
      raise ValueError('expected a finite number')
    return number
  if kind is int:
    if not -LARGEST <= value <= LARGEST:
      raise ValueError('expected a whole number below 2 ** 63')
    return int(value)
  if kind is str:
    text = str.__str__(value)
    if any(character == '\0' or '\ud800' <= character <= '\udfff' for character in text):
      raise ValueError('expected text that UTF-8 can hold, without a NUL character')
    return text
  return value


def check_type(value: Any, kind: Any) -> Any:
  """The value, as a float where an int stands for one.

  Raises:
    TypeError: it is not of the annotated type `kind`.
    ValueError: it is, but no field can hold it: infinite, NaN, beyond 64 bits, or text that UTF-8 cannot hold.
  """
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
  elif kind is float and isinstance(value, (int, float)) and not isinstance(value, bool):
    return _plain(value, float)
  elif isinstance(kind, type) and isinstance(value, kind) and (kind is bool or not isinstance(value, bool)):
    return _plain(value, kind)
  raise TypeError


def checked(name: str, value: Any, kind: Any) -> Any:
  """As `check_type`. Raises ConfigError, which calls the value `name`, for what cannot be."""
  try:
    return check_type(value, kind)
  except TypeError:
    expected = _EXPECTED.get(kind, kind.__name__ if type(kind) is type else str(kind))
    raise ConfigError(f'{name} = {shown(value)} is of type {type(value).__name__}; expected {expected}.') from None
  except ValueError as error:
    raise ConfigError(f'{name} = {shown(value)}: {error}.') from None


class Typed:
  """A configuration class. Values of another type than declared are refused when one is made, by gin or in Python."""

  def __post_init__(self) -> None:
    for field in dataclasses.fields(self):  # type: ignore[arg-type]  # a subclass is one
      name, kind, value = field.name, field.type, getattr(self, field.name)
      full = f'{type(self).__name__}.{name}'
      if not dataclasses.is_dataclass(kind):
        object.__setattr__(self, name, checked(full, value, kind))  # frozen for all others
      elif not isinstance(value, kind):  # type: ignore[arg-type]
        given = f'the class {value.__name__}' if isinstance(value, type) else f'of type {type(value).__name__}'
        raise ConfigError(f'{full} is {given}; expected {kind.__name__}.')  # type: ignore[union-attr]
