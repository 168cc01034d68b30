"""Tools to write configuration classes with: declaring fields, checking values, and hints for misspelt names."""

import dataclasses
import difflib
from collections.abc import Iterable
from typing import Any


class ConfigError(ValueError):
  """A configuration value that cannot work. The message says what was given, what is expected and what to set."""


def free(default: Any) -> Any:
  """Declares a field that may differ when a run is resumed."""
  return dataclasses.field(default=default, metadata={'free': True})


def printable(text: str) -> str:
  """A text with escapes, such as \\x1b, for what does not print or belongs to no line: control characters, lone surrogates."""
  return ''.join(char if char.isprintable() else char.encode('unicode_escape').decode() for char in text)


def one_line(text: str) -> str:
  """A text that somebody typed as an error repeats it: printable, and not much longer than a line."""
  return printable(text) if len(text) <= 200 else f'{printable(text[:100])}... ({len(text):,} characters)'


def shown(value: object) -> str:
  """A value as an error quotes it: in one line, and not much longer than that."""
  try:
    text = repr(value)
  except Exception:  # thousands of digits, or of brackets; or a class whose own repr() fails
    text = f'(a {type(value).__name__} that cannot be shown)'
  return one_line(text)


def as_count(text: str) -> int | None:
  """The whole number that a text of decimal digits stands for; None where it is no such text."""
  # int() would take '٣' and ' 3', and cannot take '³', for which str.isdigit() holds, or thousands of digits.
  return int(text) if len(text) < 20 and text.isascii() and text.isdecimal() else None


def choice(owner: object, field: str, allowed: tuple[str, ...]) -> None:
  """Raises ConfigError unless the field holds one of the allowed names."""
  value = getattr(owner, field)
  if value not in allowed:
    raise ConfigError(f'{type(owner).__name__}.{field} = {shown(value)}: expected one of {", ".join(map(repr, allowed))}.')


def in_range(owner: object, field: str, low: float, high: float = float('inf')) -> None:
  """Raises ConfigError unless low <= value <= high."""
  value = getattr(owner, field)
  if not low <= value <= high:
    expected = f'at least {low}' if high == float('inf') else f'between {low} and {high}'
    raise ConfigError(f'{type(owner).__name__}.{field} = {shown(value)}: expected a number {expected}.')


def did_you_mean(name: str, known: Iterable[str]) -> str:
  """' Did you mean A or B?' for the known names closest to `name`, '' when none is close."""
  lowered = {candidate.lower(): candidate for candidate in known}
  near = [lowered[match] for match in difflib.get_close_matches(name.lower(), lowered, n=3, cutoff=0.6)]
  return f' Did you mean {" or ".join(near)}?' if near else ''
