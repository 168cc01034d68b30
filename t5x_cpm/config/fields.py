"""Tools to write configuration classes with: declaring fields, checking values, and hints for misspelt names."""

import dataclasses
import difflib
import math
from collections.abc import Iterable
from typing import Any


class ConfigError(ValueError):
  """A configuration value that cannot work. The message says what was given, what is expected and what to set."""


def free(default: Any) -> Any:
  """Declares a field that may differ when a run is resumed."""
  return dataclasses.field(default=default, metadata={'free': True})


def choice(owner: object, field: str, allowed: tuple[str, ...]) -> None:
  """Raises ConfigError unless the field holds one of the allowed names."""
  value = getattr(owner, field)
  if value not in allowed:
    raise ConfigError(f'{type(owner).__name__}.{field} = {value!r}: expected one of {", ".join(map(repr, allowed))}.')


def in_range(owner: object, field: str, low: float, high: float = float('inf')) -> None:
  """Raises ConfigError unless low <= value <= high."""
  value = getattr(owner, field)
  if not low <= value <= high:
    expected = f'at least {low}' if high == float('inf') else f'between {low} and {high}'
    raise ConfigError(f'{type(owner).__name__}.{field} = {value!r}: expected a number {expected}.')


def finite(owner: Any) -> None:
  """Raises ConfigError for a number that is not finite, in nested dataclasses too: gin could not write it."""
  for field in dataclasses.fields(owner):
    value = getattr(owner, field.name)
    if dataclasses.is_dataclass(value):
      finite(value)
      continue
    numbers = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else [value]
    if any(isinstance(number, float) and not math.isfinite(number) for number in numbers):
      raise ConfigError(f'{type(owner).__name__}.{field.name} = {value!r}: expected a finite number.')


def did_you_mean(name: str, known: Iterable[str]) -> str:
  """' Did you mean A or B?' for the known names closest to `name`, '' when none is close."""
  lowered = {candidate.lower(): candidate for candidate in known}
  near = [lowered[match] for match in difflib.get_close_matches(name.lower(), lowered, n=3, cutoff=0.6)]
  return f' Did you mean {" or ".join(near)}?' if near else ''
