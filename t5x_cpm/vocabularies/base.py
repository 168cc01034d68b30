"""What every vocabulary offers: attributes, encoding with blanks, decoding, saving."""

import abc
import contextlib
import functools
import hashlib
import pathlib
from collections.abc import Callable, Iterable
from typing import Any

from t5x_cpm import files, stored
from t5x_cpm.config import ConfigError
from t5x_cpm.config.fields import one_line

BLANK = '<span>'
SPACE, LINE_FEED = '\u2582', '\u2583'  # written for ' ' and '\n' in the files of CPM vocabularies
MARKS = str.maketrans({' ': SPACE, '\n': LINE_FEED})
UNMARKS = str.maketrans({SPACE: ' ', LINE_FEED: '\n'})
UNKNOWN = '<unk>'  # how decoding writes what the vocabulary has no piece for
SPECIALS = (UNKNOWN, '<s>', '</s>', '<pad>', '<eod>')


def read(path: str, field: str = 'TaskConfig.vocabulary') -> bytes:
  """Reads the file of a vocabulary, which `field` names.

  Raises:
    ConfigError: it cannot be read.
  """
  from etils import epath

  try:
    return files.read_bytes(epath.Path(path).expanduser())
  except Exception as error:  # what is no path, and what libraries of buckets say, are errors of many kinds
    raise ConfigError(f'vocabulary file {one_line(str(path))} cannot be read: {getattr(error, "strerror", "") or error}. Check '
                      f'{field}.') from None


def fingerprint(kind: str, options: dict[str, str], content: bytes) -> str:
  """A hash of everything that determines ids: kind, options and file of a vocabulary."""
  digest = hashlib.blake2b(repr((kind, sorted(options.items()))).encode(), digest_size=12)
  digest.update(content)
  return digest.hexdigest()


class Vocabulary(abc.ABC):
  """Turns text into ids and ids into text.

  Attributes:
    spec: what `load` was given.
    kind: 'cpm2', 'cpm1' or 'sentencepiece'.
    files: the paths that it was read from.
    size: how many ids there are.
    pad_id: the id of padding.
    unk_id: the id of whatever the vocabulary has no piece for.
    bos_id: the id that a decoder starts from (T5: the padding id).
    eos_id: the id that ends a document.
    sentinels: the ids that mark masked spans, in order of use; printed '<s_0>', '<s_1>', ...
    fingerprint: a hash of everything that determines ids.
  """

  kind: str
  size: int
  pad_id: int
  bos_id: int
  eos_id: int
  unk_id: int
  sentinels: tuple[int, ...]

  def __init__(self, path: str, options: dict[str, str]):
    self.files = (str(path),)
    self.options = options
    self.spec = f'{self.kind}:{path}' + ('?' + '&'.join(f'{k}={v}' for k, v in options.items()) if options else '')
    self.fingerprint = fingerprint(self.kind, options, read(path))

  @functools.cached_property
  def _sentinel_number(self) -> dict[int, int]:
    return {token: number for number, token in enumerate(self.sentinels)}

  @abc.abstractmethod
  def encode(self, text: str) -> list[int]:
    """The ids of a text, without start or end. A special token that is written in the text is read as plain text."""

  def encode_batch(self, texts: Iterable[str]) -> list[list[int]]:
    """encode() of each text; several times faster for many short texts."""
    return [self.encode(text) for text in texts]

  def encode_blanks(self, text: str) -> list[int]:
    """As `encode`, but the k-th '<span>' of the text becomes the k-th sentinel.

    Raises:
      ConfigError: there are more blanks than sentinels.
    """
    texts = text.split(BLANK)
    if len(texts) - 1 > len(self.sentinels):
      raise ConfigError(f'the text has {len(texts) - 1} blanks, but {self.spec} has {len(self.sentinels)} sentinels.')
    return self._encode_around_blanks(texts)

  def _encode_around_blanks(self, texts: list[str]) -> list[int]:
    ids = self.encode(texts[0])
    for sentinel, text in zip(self.sentinels, texts[1:]):
      ids += [sentinel, *self.encode_after(BLANK, text)]
    return ids

  def encode_after(self, before: str, text: str) -> list[int]:
    """The ids that a text has within a longer one, directly after `before`; '' is the start of the longer text."""
    del before
    return self.encode(text)

  @abc.abstractmethod
  def decode(self, ids: Iterable[int]) -> str:
    """The text of ids. Sentinels are printed as '<s_k>', other special tokens are left out; an unknown id is '<unk>'."""

  @abc.abstractmethod
  def piece(self, token: int) -> str:
    """How an id is written in the vocabulary's file."""

  def save(self, directory: Any) -> None:
    """Copies the vocabulary to a folder, from which `load_saved` reads it.

    Raises:
      ConfigError: the folder cannot be written, or the file of the vocabulary has changed since it was loaded.
    """
    from etils import epath

    directory = epath.Path(directory)
    name = pathlib.Path(self.files[0]).name
    content = read(self.files[0])
    if fingerprint(self.kind, self.options, content) != self.fingerprint:
      raise ConfigError(f'{self.files[0]} has changed since it was loaded: start again.')
    try:
      directory.mkdir(parents=True, exist_ok=True)
      target = directory / name
      found = None
      with contextlib.suppress(OSError):
        found = files.read_bytes(target)
      if found != content:
        files.write_atomically(target, content)
      stored.write(directory / 'vocabulary.json', {'kind': self.kind, 'file': name, 'options': self.options,
                                                   'fingerprint': self.fingerprint})
    except OSError as error:
      raise ConfigError(f'the vocabulary could not be saved to {directory}: {error.strerror or error}.') from error


class Words(dict[str, str]):
  """Word -> its tokens, found when they are first asked for."""

  _REMEMBERED = 1 << 19

  def __init__(self, match: Callable[[str], str]):
    super().__init__()
    self._match = match

  def __missing__(self, word: str) -> str:
    if len(self) > self._REMEMBERED:
      self.clear()
    self[word] = tokens = self._match(word)
    return tokens


def no_options(spec: str, options: dict[str, str]) -> None:
  """Raises ConfigError if a spec has options."""
  if options:
    raise ConfigError(f'{spec}: vocabularies of this kind have no options.')
