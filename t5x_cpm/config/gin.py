"""Gin files and `--gin.` flags -> a Config. Only gin-config's parser is used: nothing is registered and no state is kept.

A file may bind a field of a configuration class (`TrainConfig.steps = 100`), define a macro (`STEPS = 100`, used as
`%STEPS`), include other files (one level), and limit a binding to reading or training (`eval/DecodeConfig.rule = 'beam'`,
`train/...`). On the command line a bare word is a string: `--gin.TaskConfig.name=local`.

What wins: a flag over a file, then a scoped binding over one without scope, then the later one. Macros are resolved after
everything has been read, so the order of files does not matter for them.
"""

import contextlib
import dataclasses
import difflib
import operator
import pathlib
import re
import sys
import tokenize
import typing
from collections.abc import Callable, Sequence
from typing import Any

from t5x_cpm.config.fields import ConfigError, did_you_mean, one_line, shown
from t5x_cpm.config.run import Config
from t5x_cpm.config.typed import check_type, checked

try:
  from gin import config_parser
except ImportError as error:  # in a clone, Python finds the folder gin/ in place of the missing package
  raise ConfigError(
      f'{sys.executable} has no gin-config: activate the environment of t5x_cpm (. .venv/bin/activate), or install its '
      'requirements.txt.') from error

PACKAGE = pathlib.Path(__file__).parent.parent / 'gin_files'
SCOPES = ('train', 'eval')
DEEPEST = 20  # brackets within brackets, or macros of macros
LONGEST_NAME = 200  # characters of the name of a class, a field or a macro
_KEY = re.compile(r'(?:(\w+)/)?([A-Za-z_]\w*)(?:\.([A-Za-z_]\w*))?')
# Class name -> path of its fields in Config ('train', 'model.moe'), and class name -> field -> type.
_PATHS: dict[str, str] = {}
_TYPES: dict[str, dict[str, Any]] = {}


def _register(cls: Any, path: str) -> None:
  fields = typing.get_type_hints(cls)
  nested = {field: kind for field, kind in fields.items() if dataclasses.is_dataclass(kind)}
  if path:
    _PATHS[cls.__name__] = path
    _TYPES[cls.__name__] = {field: kind for field, kind in fields.items() if field not in nested}
  for field, kind in nested.items():
    _register(kind, f'{path}.{field}'.lstrip('.'))


_register(Config, '')


@dataclasses.dataclass(frozen=True)
class _Macro:
  name: str


@dataclasses.dataclass(frozen=True)
class _Reference:
  name: str


@dataclasses.dataclass(frozen=True)
class _Binding:
  """`scope/cls.field = value`, or a macro when `field` is ''. `text` is the value as typed in a flag, None in a file."""

  scope: str
  cls: str
  field: str
  value: Any
  where: str
  text: str | None = None

  @property
  def rank(self) -> tuple[bool, bool]:
    return self.text is not None, bool(self.scope)


class _Delegate(config_parser.ParserDelegate):
  """Turns macros and references into plain markers."""

  def macro(self, macro_name: str) -> _Macro:
    return _Macro(macro_name)

  def configurable_reference(self, scoped_configurable_name: str, evaluate: bool) -> _Reference:
    return _Reference(scoped_configurable_name)


def shipped_files(folder: str) -> list[str]:
  """Names of the gin files of the package in 'models', 'runs' or 'mesh', without '.gin'."""
  return sorted(file.stem for file in (PACKAGE / folder).glob('*.gin'))


def summary(folder: str, name: str) -> str:
  """The first comment line of a gin file of the package."""
  first = (PACKAGE / folder / f'{name}.gin').read_text(encoding='utf-8').partition('\n')[0]
  return first.removeprefix('#').strip()


def find(path: str) -> Any:
  """The file of a gin path: as given (also gs://...), else in the package, where a leading 'gin/' is optional.

  Raises:
    ConfigError: no such file; the message says where it was searched for, and lists files with similar names.
  """
  try:
    if '://' in path:
      from etils import epath
      candidates: list[Any] = [epath.Path(path)]
    else:
      candidates = [pathlib.Path(path)]
      if not candidates[0].is_absolute():
        candidates.append(PACKAGE / (path[4:] if path.startswith('gin/') else path))
    for candidate in candidates:
      if candidate.is_file():
        return candidate
  except Exception as error:  # a name too long for the system; a bucket fails with errors of many libraries
    reason = str(getattr(error, 'strerror', '') or error or type(error).__name__).strip().partition('\n')[0][:200]
    raise ConfigError(f'gin file {shown(path)} cannot be reached: {reason}.') from error
  known = {f'gin/{folder}/{name}.gin': name for folder in ('runs', 'models', 'mesh') for name in shipped_files(folder)}
  known |= {str(file): file.stem for file in pathlib.Path(path).parent.glob('*.gin')}
  matches = difflib.get_close_matches(path.rsplit('/', 1)[-1].removesuffix('.gin'), known.values(), n=3)
  near = [full for full, name in known.items() if name in matches]
  hint = f' Did you mean {" or ".join(near)}?' if near else ''
  searched = ' and '.join(str(one.absolute()) if isinstance(one, pathlib.Path) else str(one) for one in candidates)
  if not path.isprintable() or len(path) > LONGEST_NAME:
    searched = 'the current folder and the package'
  raise ConfigError(f'gin file {shown(path)} not found; searched {searched}.{hint}')


def _items(value: Any) -> list[Any]:
  if isinstance(value, dict):
    return [*value.keys(), *value.values()]
  return list(value) if isinstance(value, (list, tuple)) else []


def _refuse(value: Any, where: str, depth: int = 0) -> None:
  """Raises ConfigError for an @reference anywhere in a value, and for a value that is nested without end."""
  if depth > DEEPEST:
    raise ConfigError(f'{where}: more than {DEEPEST} brackets stand within each other.')
  if isinstance(value, _Reference):
    raise ConfigError(
        f'{where}: @{one_line(value.name)} is a gin reference. t5x_cpm takes plain values only; a variant is chosen by its '
        "name, as in OptimizerConfig.name = 'adafactor'.")
  for item in _items(value):
    _refuse(item, where, depth + 1)


def _unreadable(error: Exception) -> str:
  """What is wrong with a value of which Python itself cannot make a list or a dict."""
  return 'too many brackets stand within each other' if isinstance(error, RecursionError) else f'{error}, as the key of a dict'


def _read_file(path: str, included: bool = False) -> list[_Binding]:
  """The bindings of a file in order; those of an included file stand where it is included."""
  file = find(path)
  bindings: list[_Binding] = []

  def at(line: int | None) -> str:
    return f'{path}:{line}' if line else path

  parser = None
  try:
    parser = config_parser.ConfigParser(file.read_text(encoding='utf-8-sig'), _Delegate())
    for statement in parser:
      where = at(statement.location.line_num)
      if isinstance(statement, config_parser.IncludeStatement):
        if included:
          raise ConfigError(f'{where}: an included file cannot include another; do it in the file that includes this one.')
        try:
          bindings += _read_file(statement.filename, included=True)
        except ConfigError as error:
          raise ConfigError(f'{where}: {error}') from None
      elif isinstance(statement, config_parser.ImportStatement):
        raise ConfigError(f'{where}: gin files cannot import; use the flag --import={one_line(statement.module)}.')
      elif isinstance(statement, config_parser.BindingStatement):
        bindings.append(_Binding(statement.scope, statement.selector, statement.arg_name, statement.value, where))
        _refuse(statement.value, where)
  except SyntaxError as error:  # the parser puts a (file, line, column, text) beside its message
    detail = error.args[1] if len(error.args) > 1 else (None, None, None, '')
    reason = str(error.args[0]).splitlines()[0]
    if word := re.search(r"Failed to parse token '([^\W\d]\w{,99})'", str(error.args[0])):
      reason = f"{word[1]} is not a value; a string needs quotes and a macro a percent sign: '{word[1]}', %{word[1]}."
    raise ConfigError(f'{at(detail[1])}: cannot parse {shown(str(detail[3] or "").strip())}: {reason[:200]}') from None
  except tokenize.TokenError as error:
    raise ConfigError(f'{at(error.args[1][0])}: cannot parse: {error.args[0]}; a bracket or a quote is not closed.') from None
  except (RecursionError, TypeError) as error:
    raise ConfigError(f'{at(parser and parser.current_token.start[0])}: cannot parse: {_unreadable(error)}.') from None
  except UnicodeDecodeError as error:
    raise ConfigError(f'{path}: not UTF-8 text ({error}).') from None
  except OSError as error:
    raise ConfigError(f'{path} cannot be read: {error.strerror or error}.') from None
  return bindings


def _parse_flag(text: str) -> _Binding:
  """'TrainConfig.steps=3' as a binding; what is not a literal or a macro is a string."""
  where = f'--gin.{one_line(text)}'
  key, equals, value_text = text.partition('=')
  match = _KEY.fullmatch(key.strip())
  if not equals or not match:
    raise ConfigError(f'{where}: expected --gin.CLASS.FIELD=VALUE or --gin.MACRO=VALUE.')
  scope, cls, field = (group or '' for group in match.groups())
  value_text = value_text.strip()
  value: Any = value_text
  try:
    parser = config_parser.ConfigParser(value_text, _Delegate())
    parsed = parser.parse_value()
    if parser.current_token.type in (tokenize.NEWLINE, tokenize.ENDMARKER):
      value = parsed
  except (SyntaxError, tokenize.TokenError):
    # A glob may begin with '[', and a template with '{'; nothing else that is plain begins like these.
    is_template = value_text[:1] == '{' and _TYPES.get(cls, {}).get(field) is str
    if value_text[:1] in ('{', "'", '"') and not is_template:
      raise ConfigError(f'{where}: cannot parse the value: a bracket or a quote is missing.') from None
  except (RecursionError, TypeError) as error:
    raise ConfigError(f'{where}: cannot parse the value: {_unreadable(error)}.') from None
  _refuse(value, where)
  return _Binding(scope, cls, field, value, where, value_text)


def _check_names(binding: _Binding) -> None:
  """Raises ConfigError for a scope, class or field that does not exist."""
  if max(map(len, (binding.scope, binding.cls, binding.field))) > LONGEST_NAME:
    raise ConfigError(f'{binding.where}: no name has more than {LONGEST_NAME} characters.')
  if binding.scope and binding.scope not in SCOPES:
    raise ConfigError(f'{binding.where}: unknown scope {binding.scope!r}: expected one of {", ".join(SCOPES)}.')
  if not binding.field:
    if binding.cls in _PATHS:
      raise ConfigError(f'{binding.where}: {binding.cls} is a class; bind one of its fields: {", ".join(_TYPES[binding.cls])}.')
    return
  if binding.cls not in _PATHS:
    owners = [cls for cls, fields in _TYPES.items() if binding.field in fields]
    hint = did_you_mean(binding.cls, _PATHS) or (f' {binding.field} is a field of {" and ".join(owners)}.' if owners else '')
    raise ConfigError(f'{binding.where}: unknown class {binding.cls}.{hint} Known: {", ".join(_PATHS)}.')
  fields = _TYPES[binding.cls]
  if binding.field not in fields:
    owners = [f'{cls}.{binding.field}' for cls in _PATHS if binding.field in _TYPES[cls]]
    hint = f' Did you mean {" or ".join(owners)}?' if owners else did_you_mean(binding.field, fields)
    raise ConfigError(f'{binding.where}: {binding.cls} has no field {binding.field}.{hint} Its fields: {", ".join(fields)}.')


def _typed(binding: _Binding, value: Any, text: str | None) -> Any:
  """The value of a binding, checked against its field. A flag's text stands in where a string is wanted."""
  kind = _TYPES[binding.cls][binding.field]
  if text is not None and not isinstance(value, dict):
    try:
      check_type(value, kind)
    except TypeError:
      with contextlib.suppress(TypeError):
        try:
          value = check_type(text, kind)
        except ValueError:
          value = text  # told below
    except ValueError:
      pass  # told below
  try:
    return checked(f'{binding.cls}.{binding.field}', value, kind)
  except ConfigError as error:
    raise ConfigError(f'{binding.where}: {error}') from None


class _Macros:
  """The macros of a run. `value_of` replaces them in a value."""

  def __init__(self, definitions: dict[str, _Binding], bindings: Sequence[_Binding]):
    self.definitions = definitions
    used: dict[str, str] = {}
    for binding in bindings:
      for name in self._names(binding.value):
        used.setdefault(name, binding.where)
    for name, where in used.items():
      if name not in definitions:
        raise ConfigError(
            f'{where}: macro %{one_line(name)} is used but not defined.{did_you_mean(name, definitions)} Define it: NAME = '
            'VALUE in a file, or --gin.NAME=VALUE.')
    for name, binding in definitions.items():
      if name not in used:
        fields = [f'{cls}.{field}' for cls in _PATHS for field in _TYPES[cls] if field == name.lower()]
        hint = did_you_mean(name, used) or (f' Did you mean {" or ".join(fields)}?' if fields else '')
        raise ConfigError(f'{binding.where}: macro {name} is defined but never used as %{name}.{hint}')

  def _names(self, value: Any) -> list[str]:
    return [value.name] if isinstance(value, _Macro) else [name for item in _items(value) for name in self._names(item)]

  def value_of(self, binding: _Binding) -> tuple[Any, str | None]:
    """The value of a binding without macros, and its text if it comes from a flag."""
    try:
      return self._resolve(binding.value, binding.text, ())
    except (RecursionError, TypeError) as error:  # macros may hide what the parser has not seen
      raise ConfigError(f'{binding.where}: {_unreadable(error)}.') from None

  def _resolve(self, value: Any, text: str | None, seen: tuple[str, ...]) -> tuple[Any, str | None]:
    if isinstance(value, _Macro):
      definition = self.definitions[value.name]
      if value.name in seen:
        raise ConfigError(f'{definition.where}: macro %{value.name} refers to itself.')
      if len(seen) >= DEEPEST:
        raise ConfigError(f'{definition.where}: macro %{value.name} stands in a chain of more than {DEEPEST} macros.')
      return self._resolve(definition.value, definition.text, (*seen, value.name))

    def inner(item: Any) -> Any:
      return self._resolve(item, None, seen)[0]

    if isinstance(value, dict):
      return {inner(k): inner(v) for k, v in value.items()}, text
    if isinstance(value, (list, tuple)):
      return type(value)(inner(item) for item in value), text
    return value, text


def _replace(config: Any, path: Sequence[str], fields: dict[str, Any]) -> Any:
  """A copy of a dataclass, with fields of the one at `path` in it changed."""
  if not path:
    return dataclasses.replace(config, **fields)
  return dataclasses.replace(config, **{path[0]: _replace(getattr(config, path[0]), path[1:], fields)})


def load(files: Sequence[str], overrides: Sequence[str] = (), *, scope: str = '', base: Config | None = None,
         check: Callable[[Config], None] | None = None) -> Config:
  """The configuration that gin files and flags describe, checked field by field and by Config.validate().

  Args:
    files: gin paths, searched in the current folder and then in the package.
    overrides: flags without their '--gin.', as 'TrainConfig.steps=3' or 'STEPS=3'.
    scope: 'train', 'eval' or ''. Bindings of another scope are checked but not applied.
    base: the configuration that is changed; None is the defaults.
    check: raises ConfigError for what Config.validate() cannot know, such as the name of a router that nobody registered.

  Raises:
    ConfigError: with the file and line, or the flag, at fault.
  """
  bindings = [binding for path in files for binding in _read_file(path)]
  bindings += [_parse_flag(text) for text in overrides]
  for binding in bindings:
    _check_names(binding)
  bindings.sort(key=lambda binding: binding.rank)  # stable: within a rank the later one wins

  definitions: dict[str, _Binding] = {}
  for applies in (False, True):  # a macro of another scope is known, but gives way to one that applies here
    definitions |= {b.cls: b for b in bindings if not b.field and (b.scope in ('', scope)) == applies}
  macros = _Macros(definitions, bindings)

  values: dict[str, dict[str, Any]] = {}
  where: dict[tuple[str, str], str] = {}
  for binding in bindings:
    if binding.field:
      value = _typed(binding, *macros.value_of(binding))
      if binding.scope in ('', scope):
        values.setdefault(binding.cls, {})[binding.field] = value
        where[binding.cls, binding.field] = binding.where

  config = base or Config()
  for cls, fields in values.items():
    config = _replace(config, _PATHS[cls].split('.'), fields)
  try:
    config.validate()
    if check is not None:
      check(config)
  except ConfigError as error:
    named = re.findall(r'(\w+)\.(\w+)', str(error))
    classes = {cls for cls, _ in named}  # a field that was not set may be at fault with one of its class that was
    sources = [where[key] for key in named if key in where] or [place for (cls, _), place in where.items() if cls in classes]
    raise ConfigError(f'{error} (set in {sources[0]})' if sources else str(error)) from None
  return config


def dump(config: Config) -> str:
  """Gin text that binds every field; `load` of it gives the same Config."""
  blocks = []
  for cls, path in _PATHS.items():
    values = operator.attrgetter(path)(config)
    blocks.append(''.join(f'{cls}.{field} = {getattr(values, field)!r}\n' for field in _TYPES[cls]))
  return '\n'.join(blocks)
