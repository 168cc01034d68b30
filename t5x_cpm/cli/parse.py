"""Reads a command line by a table of modes, and writes the help from the same table."""

import argparse
import dataclasses
import functools
import re
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import t5x_cpm
from t5x_cpm.config import ConfigError
from t5x_cpm.config.fields import did_you_mean

WIDTH = 100  # columns of help


@dataclasses.dataclass(frozen=True)
class Flag:
  """A flag of a mode.

  Attributes:
    name: without the dashes.
    value: what help shows for its value; '' for a switch.
    text: its line of help.
    repeat: it may be given several times, and its value is a list.
    kind: str, or int for a whole number.
    default: its value where it is not given.
  """

  name: str
  value: str
  text: str
  repeat: bool = False
  kind: type = str
  default: Any = ''


@dataclasses.dataclass(frozen=True)
class Mode:
  """A mode of the program.

  Attributes:
    name: the word that is typed.
    text: what it does, in one line.
    function: runs it; called with the Arguments and, where the mode reads gin, the Config.
    example: shell commands that run as they are, from the top of a clone.
    flags: every flag that it takes, but --gin.CLASS.FIELD.
    needs: the flags without which it cannot run.
    gin: the configuration classes that it reads; () for a mode without configuration.
    scope: the scope of the gin bindings that apply, 'train' or 'eval'; a mode of scope 'eval' reads a run.
    on_cpu: whether it leaves accelerators alone.
    words: what follows the mode's name, as Flags without dashes.
    tells: whether it says itself what it would do (--dry_run).
  """

  name: str
  text: str
  function: Callable[..., None]
  example: str
  flags: tuple[Flag, ...] = ()
  needs: tuple[str, ...] = ()
  gin: tuple[str, ...] = ()
  scope: str = ''
  on_cpu: bool = False
  words: tuple[Flag, ...] = ()
  tells: bool = False

  def find(self, name: str) -> Flag | None:
    """The flag of this name; None where the mode has none."""
    return next((flag for flag in self.flags if flag.name == name), None)

  def call(self, name: str) -> str:
    """What is to be written for a flag or a word of this name."""
    flag = self.find(name)
    word = next((word for word in self.words if word.name == name), None)
    return f'--{name}={flag.value}' if flag else f'{word.value} after its name' if word else name


@dataclasses.dataclass(frozen=True)
class Arguments:
  """What a command line says: values by flag, and `--gin.` overrides without their prefix."""

  mode: Mode
  values: Mapping[str, Any]
  overrides: list[str]

  def get(self, name: str) -> Any:
    """The value of a flag, or '' where the mode has no such flag."""
    return self.values.get(name, '')


class Parser(argparse.ArgumentParser):
  """Raises ConfigError instead of ending the program."""

  def error(self, message: str) -> Any:
    raise ConfigError(message)


def at_least(least: int) -> Callable[[str], int]:
  """The type of an argument that is a whole number from `least`."""

  def read(text: str) -> int:
    if not text.isdecimal() or int(text) < least:
      raise argparse.ArgumentTypeError(f'{text!r}: expected a whole number from {least}')
    return int(text)

  return read


class _Once(argparse.Action):
  """Stores a value, and refuses a second one that differs."""

  def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: str | None = None) -> None:
    before = getattr(namespace, self.dest)
    if before is not self.default and before != values:
      raise ConfigError(f'{option_string} is given twice: {before!r} and {values!r}.')
    setattr(namespace, self.dest, values)


def _epilog(mode: Mode) -> str:
  sections = []
  if mode.gin:
    names = textwrap.fill(', '.join(mode.gin), WIDTH - 2, initial_indent='  ', subsequent_indent='  ')
    sections.append(f'gin classes (their fields: t5x_cpm fields CLASS)\n{names}')
  sections.append('example\n' + textwrap.indent(mode.example, '  '))
  return '\n\n'.join(sections)


def _parser(mode: Mode) -> argparse.ArgumentParser:
  parser = Parser(
      prog=f't5x_cpm {mode.name}', description=mode.text[0].upper() + mode.text[1:] + '.', epilog=_epilog(mode), add_help=False,
      allow_abbrev=False, exit_on_error=False,
      usage=' '.join(['t5x_cpm', mode.name, *(word.value for word in mode.words)])
            + (' [--flag=value ...]' if mode.flags else '') + (' [--gin.CLASS.FIELD=VALUE ...]' if mode.gin else ''),
      formatter_class=functools.partial(argparse.RawDescriptionHelpFormatter, width=WIDTH, max_help_position=28))
  if mode.words:
    words = parser.add_argument_group('words' if mode.words[1:] else 'word')
    for word in mode.words:
      words.add_argument(word.name, metavar=word.value, nargs='?', default='', help=word.text)
  group = parser.add_argument_group('flags')
  for flag in mode.flags:
    text = f'{flag.text} (needed)' if flag.name in mode.needs else flag.text
    if flag.default != '':
      text += f' (default: {flag.default})'
    if flag.repeat:
      group.add_argument(f'--{flag.name}', metavar=flag.value, action='append', default=[], help=f'{text} (may be repeated)')
    elif flag.value:
      group.add_argument(f'--{flag.name}', metavar=flag.value, action=_Once, type=flag.kind, default=flag.default, help=text)
    else:
      group.add_argument(f'--{flag.name}', action='store_true', help=text)
  group.add_argument('--help', '-h', action='store_true', help='print this text')
  return parser


def print_table(rows: Iterable[tuple[str, str]], width: int = 24) -> None:
  """Prints names and what they are, side by side."""
  for name, text in rows:
    print(textwrap.fill(text, WIDTH, initial_indent=f'  {name:<{width - 3}} ', subsequent_indent=' ' * width))


def print_text(text: str, indent: int) -> None:
  """Prints paragraphs, each filled to the width of the help."""
  for number, paragraph in enumerate(text.split('\n\n') if text else ()):
    print(('\n' if number else '') + textwrap.fill(
        paragraph, WIDTH, initial_indent=' ' * indent, subsequent_indent=' ' * indent))


def print_help(modes: Iterable[Mode]) -> None:
  """Prints the modes, how configuration is given, and where to read on."""
  print('usage: t5x_cpm MODE [--flag=value ...] [--gin.CLASS.FIELD=VALUE ...]\n\nmodes')
  print_table(((mode.name, mode.text) for mode in modes), 14)
  print("""
configuration
  --gin_file=FILE binds fields in a gin file, as in TrainConfig.steps = 200; later files win.
  --gin.CLASS.FIELD=VALUE binds one, as in --gin.TrainConfig.steps=200, and wins over files.
  --dry_run prints what that gives, with sizes and learning rates, and stops.

more
  t5x_cpm MODE --help      flags of a mode, the gin classes that it reads, an example
  t5x_cpm fields [CLASS]   every field that gin can bind, with its type, default and meaning
  t5x_cpm files            models, runs and meshes that ship as gin files
  t5x_cpm tasks            what a run can be trained and evaluated on
  t5x_cpm --version""")


def print_mode_help(mode: Mode) -> None:
  """Prints the flags of a mode, its gin classes and an example."""
  print(_parser(mode).format_help(), end='')


def _mode_first(argv: Sequence[str], modes: Mapping[str, Mode]) -> tuple[str, list[str]]:
  """The first word that is neither a flag nor the value of one ('' if there is none), and all other words."""
  valued = {flag.name for mode in modes.values() for flag in mode.flags if flag.value}
  for index, word in enumerate(argv):
    before = argv[index - 1] if index else ''
    if not word.startswith('-') and not (before.startswith('--') and before[2:] in valued):
      return word, [*argv[:index], *argv[index + 1:]]
  return '', list(argv)


def _refuse(word: str, mode: Mode, modes: Mapping[str, Mode]) -> ConfigError:
  """The error for a word that the parser of a mode does not know."""
  if not word.startswith('-'):
    return ConfigError(f'{word!r} is left over after mode {mode.name!r}; flags begin with --.')
  name = word.lstrip('-').partition('=')[0]
  owners = [other.name for other in modes.values() if other.find(name)]
  if owners and word.startswith('--'):
    listed = ', '.join(owners[:-1]) + (' and ' if owners[1:] else '') + owners[-1]
    return ConfigError(f'--{name} is a flag of {listed}, not of {mode.name}.')
  if '.' in name:
    hint = f' Did you mean --gin.{word.lstrip("-").removeprefix("gin.")}?'
  else:
    known = [f'--{flag.name}' for owner in (mode, *modes.values()) for flag in owner.flags]
    hint = did_you_mean(f'--{name}', dict.fromkeys(known))
  return ConfigError(f'unknown flag {word.partition("=")[0]}.{hint} `t5x_cpm {mode.name} --help` lists the flags.')


def _explain(error: argparse.ArgumentError, mode: Mode) -> ConfigError:
  """An error of argparse in the words of this program."""
  name = (error.argument_name or '').lstrip('-').partition('/')[0]
  flag = mode.find(name)
  value = re.search(r"'(.*)'", error.message)
  if flag is None or not flag.value:
    return ConfigError(f'--{name} is a switch and takes no value.')
  if flag.kind is int and value:
    return ConfigError(f'--{name}={value[1]}: expected a whole number.')
  return ConfigError(f'--{name} needs a value: --{name}={flag.value}.')


def parse(argv: Sequence[str], modes: Mapping[str, Mode]) -> Arguments | None:
  """Reads a command line.

  Args:
    argv: the words of the command line, without the name of the program.
    modes: the modes by name.

  Returns:
    What it says; None if it asked for help or the version, which have then been printed.

  Raises:
    ConfigError: something unknown, with the nearest name, or a value that is missing or given twice.
  """
  name, rest = _mode_first(argv, modes)
  asks = {'--help', '-h'} & set(rest)
  if '--version' in rest:
    print(f't5x_cpm {t5x_cpm.__version__}')
    return None
  if not argv or (asks and not name):
    print_help(modes.values())
    return None
  if name not in modes:
    given = f'unknown mode {name!r}' if name else 'no mode'
    raise ConfigError(f'{given}: expected one of {", ".join(modes)}.{did_you_mean(name, modes)}')
  mode = modes[name]
  if asks:
    print_mode_help(mode)
    return None
  overrides = [word for word in rest if re.match(r'--gin\.', word)]
  if overrides and not mode.gin:
    raise ConfigError(f'{overrides[0]}: {mode.name} reads no gin configuration.')
  for word in overrides:
    if '=' not in word:
      raise ConfigError(f'{word}: expected --gin.CLASS.FIELD=VALUE or --gin.MACRO=VALUE.')
  try:
    values, unknown = _parser(mode).parse_known_intermixed_args([word for word in rest if word not in overrides])
  except argparse.ArgumentError as error:
    raise _explain(error, mode) from None
  if unknown:
    raise _refuse(unknown[0], mode, modes)
  for flag in mode.flags:
    value = getattr(values, flag.name)
    if flag.value and not all(isinstance(given, str | int) for given in (value if flag.repeat else [value])):
      raise ConfigError(f'--{flag.name} needs a value: --{flag.name}={flag.value}.')  # of '--' argparse makes an empty list
  return Arguments(mode, vars(values), [word.removeprefix('--gin.') for word in overrides])
