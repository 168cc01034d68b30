"""Explains every field that gin can bind, from the comments in the source of the configuration classes."""

import ast
import dataclasses
import inspect
import io
import tokenize
import typing
from collections.abc import Iterator
from typing import Any

from t5x_cpm.config.fields import ConfigError, did_you_mean, one_line
from t5x_cpm.config.run import Config


@dataclasses.dataclass(frozen=True)
class Field:
  """A field of a configuration class.

  Attributes:
    name: its name.
    kind: its type, as written in the source.
    default: its value where nothing binds it.
    free: whether it may differ when a run is resumed.
    comment: the comment beside it in the source and those in the lines above it; '' where the docstring of the class
      explains it.
  """

  name: str
  kind: str
  default: Any
  free: bool
  comment: str


def classes(cls: type = Config) -> Iterator[type]:
  """The classes whose fields gin can bind: every dataclass that is a field of Config, or of such a class."""
  for kind in typing.get_type_hints(cls).values():
    if dataclasses.is_dataclass(kind):
      assert isinstance(kind, type)
      yield kind
      yield from classes(kind)


def find(name: str) -> type:
  """The class with this name. Raises ConfigError, with similar names, if there is none."""
  known = {cls.__name__: cls for cls in classes()}
  if name not in known:
    raise ConfigError(f'unknown class {one_line(name)}: expected one of {", ".join(known)}.{did_you_mean(name, known)}')
  return known[name]


def fields(cls: type) -> list[Field]:
  """The fields of a class in the order of its source, without those that hold another class."""
  source = inspect.getsource(cls)
  comments = {token.start[0]: (token.string.lstrip('# '), token.line.lstrip().startswith('#'))
              for token in tokenize.generate_tokens(io.StringIO(source).readline) if token.type == tokenize.COMMENT}
  declared = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
  result = []
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id in declared:
      name = node.target.id
      default = getattr(cls(), name)
      if dataclasses.is_dataclass(default):
        continue
      above: list[str] = []
      line = node.lineno - 1
      while comments.get(line, ('', False))[1]:
        above.insert(0, comments[line][0])
        line -= 1
      beside = [comments[node.end_lineno][0]] if node.end_lineno in comments else []
      free = bool(declared[name].metadata.get('free'))
      result.append(Field(name, ast.unparse(node.annotation), default, free, ' '.join(above + beside)))
  return result
