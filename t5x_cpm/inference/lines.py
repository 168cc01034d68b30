"""The input of `infer`: each line of a file is a text to answer, or else something is wrong with it."""

import pathlib
import sys
import types
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from t5x_cpm import user_files
from t5x_cpm.config import Config, ConfigError
from t5x_cpm.config.fields import shown
from t5x_cpm.config.template import FieldError, Template
from t5x_cpm.inference import text

SUFFIXES = ('.txt', '.jsonl')
DELTA = 'delta'  # the field of a JSON object that names the delta which answers it


class Line(NamedTuple):
  """A line of the input: its text, or what is wrong with it. An empty line has the text ''.

  Attributes:
    number: from 1.
    text: to answer.
    error: what is wrong, '' for a good line.
    others: the other fields of a JSON object, which its answer carries too.
    is_alone: whether the error is of a kind that never keeps other lines from being answered.
  """

  number: int
  text: str
  error: str = ''
  others: Mapping[str, Any] = types.MappingProxyType({})
  is_alone: bool = False


Templates = Mapping[str, Template | None]  # by the names of deltas; '' is the base, None fills no fields in
NO_TEMPLATES: Templates = types.MappingProxyType({})


def from_bytes(number: int, raw: bytes, field: str = '', templates: Templates = NO_TEMPLATES) -> Line:
  """A line of .txt, or, where a field is named, of .jsonl. An object without this field fills the template of its delta."""
  others: dict[str, Any] = {}
  try:
    line = user_files.decode(raw)
    if not field or not line.strip():
      return Line(number, line if line.strip() else '')
    value = user_files.json_object(line, (field,))
    others = {name: other for name, other in value.items() if name != field}
    name = next((known for known in templates if known == value.get(DELTA)), '')
    template = templates.get(name)
    if template and field not in value:
      given = template.fill(value)
    else:
      given, = user_files.texts_of(value, (field,), 'InferConfig.text_field names the field')
  except FieldError as error:
    owner = f'delta {name!r}' if name else 'model'
    return Line(number, '', f'{error} (LocalTaskConfig.inputs_template of the {owner} names it)', others)
  except user_files.MalformedError as error:
    return Line(number, '', str(error), others)
  return Line(number, given if given.strip() else '', '', others)


def template_of(config: Config) -> Template | None:
  """How the run of a model made its inputs of the fields of a line, if it did."""
  own = config.task.objective == 'pairs' and config.task.name.partition(':')[0] == 'local'
  return config.local_task.templates()[0] if own else None


def read_lines(path: pathlib.Path, name: str, field: str, templates: Templates = NO_TEMPLATES) -> Iterator[Line]:
  """The inputs of a file, which errors call `name`: of .txt one per line, of .jsonl as `from_bytes` says.

  Raises:
    ConfigError: it cannot be read, or is not text in UTF-8.
  """
  with user_files.opened(path, name) as file:
    for number, raw in enumerate(user_files.lines(file, name), 1):
      yield from_bytes(number, raw, field if path.suffix == '.jsonl' else '', templates)


def checked(lines: Iterator[Line], codec: text.Codec,
            deltas: Mapping[str, text.Codec] = types.MappingProxyType({})) -> Iterator[tuple[Line, text.Request | None]]:
  """Encodes every line that is good; a line that cannot be encoded gets its error."""
  for line in lines:
    request = None
    if line.text and not line.error:
      name = (line.others.get(DELTA) or '') if deltas else ''
      if name and (not isinstance(name, str) or name not in deltas):
        wrong = f'{DELTA} = {shown(name)}: expected {", ".join(map(repr, deltas))}, or none'
        yield line._replace(error=wrong, is_alone=True), None
        continue
      try:
        request = (deltas[name] if name else codec).request(line.text)._replace(delta=name)
      except ConfigError as error:
        line = line._replace(error=str(error))
    yield line, request


def check_file(path: pathlib.Path, name: str, codec: text.Codec, config: Config,
               deltas: Mapping[str, text.Codec] = types.MappingProxyType({}), templates: Templates = NO_TEMPLATES) -> int:
  """Reads the whole input once, so that a bad line is found before hours of work.

  Args:
    path: the input.
    name: what errors call it.
    codec, config: those of the run, with the lengths to use.
    deltas: the codecs of the deltas that lines may name; a line that names another is told, and left unanswered.
    templates: as `from_bytes` takes them.

  Returns:
    The number of lines.

  Raises:
    ConfigError: the file cannot be read; or the first bad line, with its number, unless InferConfig.skip_malformed.
  """
  count, noted, first = 0, 0, ''
  unknown, first_unknown = 0, ''
  for line, request in checked(read_lines(path, name, config.infer.text_field, templates), codec, deltas):
    count += 1
    if line.is_alone:
      unknown, first_unknown = unknown + 1, first_unknown or f'{name}:{line.number}: {line.error}'
    elif line.error and not config.infer.skip_malformed:
      raise ConfigError(f'{name}:{line.number}: {line.error.rstrip(".")}. InferConfig.skip_malformed = True leaves such lines '
                        'unanswered.')
    if request and request.note:
      noted, first = noted + 1, first or f'{name}:{line.number}: {request.note}'
  if unknown:
    left = 'This line is' if unknown == 1 else f'{unknown:,} such lines are'
    print(f'warning: {first_unknown}. {left} left unanswered.', file=sys.stderr, flush=True)
  if first:
    print(f'warning: {first}' + (f' ({noted:,} lines have such marks.)' if noted > 1 else ''), file=sys.stderr, flush=True)
  return count
