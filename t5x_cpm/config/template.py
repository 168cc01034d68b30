"""Templates, which make a text of the fields of a JSON line: '{sentence1}<prompt>{sentence2}'."""

import dataclasses
import json
import string
from collections.abc import Mapping
from typing import Any

from t5x_cpm.config.fields import ConfigError, shown

PROMPT = '<prompt>'  # where vectors of a prompt stand in a text


class FieldError(ValueError):
  """A JSON object from which a template cannot be filled."""


@dataclasses.dataclass(frozen=True)
class Template:
  """A text with places for fields.

  Attributes:
    parts: what stands before each field, and the field; '' after the last one.
    marks: how often PROMPT stands in it.
  """

  parts: tuple[tuple[str, str], ...]
  marks: int

  @property
  def fields(self) -> tuple[str, ...]:
    """The names of its fields."""
    return tuple(dict.fromkeys(field for _, field in self.parts if field))

  def fill(self, values: Mapping[str, Any]) -> str:
    """The text made of the fields of a JSON object: texts as they are, numbers, true and false as JSON writes them.

    A text of which every field is blank is ''.

    Raises:
      FieldError: a field is missing, is neither a text nor a number, or holds PROMPT where that marks places in the template.
    """
    texts = {}
    for field in self.fields:
      if field not in values:
        raise FieldError(f'no field {field!r} among {shown(sorted(values)[:8])}')
      value = values[field]
      if not isinstance(value, str | int | float):
        raise FieldError(f'{field!r} is neither a text nor a number')
      texts[field] = value if isinstance(value, str) else json.dumps(value)
      if any('\ud800' <= character <= '\udfff' for character in texts[field]):
        raise FieldError(f'{field!r} holds half of a surrogate pair')
      if self.marks and PROMPT in texts[field]:
        raise FieldError(f'{field!r} has {PROMPT} in it, which marks the places of a prompt here')
    if not any(text.strip() for text in texts.values()):
      return ''
    return ''.join(before + (texts[field] if field else '') for before, field in self.parts)


def parse(text: str, name: str) -> Template:
  """Reads a template, in which {{ and }} stand for braces.

  Raises:
    ConfigError: a brace is open, a place has no plain name, or there is no field at all. The message calls the text `name`.
  """
  what = f'{name} = {shown(text)}'
  try:
    found = list(string.Formatter().parse(text))
  except ValueError as error:
    raise ConfigError(f'{what}: {error}; a brace that is meant as such is written twice, {{{{ or }}}}.') from None
  for _, field, form, conversion in found:
    if field is not None and (not field or form or conversion or not field.isidentifier()):
      given = field + (f'!{conversion}' if conversion else '') + (f':{form}' if form else '')
      raise ConfigError(f"{what}: expected the plain name of a field of the JSON lines in each pair of braces, as in "
                        f"'{{sentence1}}', got {{{given}}}.")
  template = Template(tuple((before, field or '') for before, field, _, _ in found),
                      sum(before.count(PROMPT) for before, _, _, _ in found))
  if not template.fields:
    raise ConfigError(f"{what} has no field: expected one of the JSON lines in braces, as in '{{sentence1}}'.")
  return template
