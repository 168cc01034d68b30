"""What every field that gin can bind means, read from the source of the configuration classes, where it stands in comments."""

import ast
import dataclasses
import inspect
import io
import tokenize
import typing
from collections.abc import Iterator
from typing import Any

from t5x_cpm.config.fields import ConfigError, did_you_mean
from t5x_cpm.config.run import Config


@dataclasses.dataclass(frozen=True)
class Field:
  """A field of a configuration class.

  Attributes:
    name: of the field.
    kind: its type, as the source has it.
    default: its value where nothing binds it.
    free: whether it may differ when a run is resumed.
    comment: what stands beside it in the source, or above it in lines of their own; '' where the docstring of the class
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
  """The class of a name. Raises ConfigError with near names where there is none."""
  known = {cls.__name__: cls for cls in classes()}
  if name not in known:
    raise ConfigError(f'unknown class {name}: expected one of {", ".join(known)}.{did_you_mean(name, known)}')
  return known[name]


def fields(cls: type) -> list[Field]:
  """The fields of a class in the order of its source, those left out that are classes themselves."""
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
