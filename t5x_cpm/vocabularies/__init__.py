"""Text to ids and back: CPM-2, CPM-1 and plain SentencePiece vocabularies.

`load` gives a `Vocabulary` by its name, `load_saved` one that was saved with a model or a cache. `train` makes a new one, and
`report` measures how well one fits some text. Nothing here knows about batches, models or TensorFlow. The libraries that a
vocabulary needs are imported when it is used.

A vocabulary is named by a spec, KIND:FILE or KIND:FILE?option=value:

  cpm2:vocab.txt             one piece a line; text is cut into words (`word_cut`), each word matched longest piece first
  cpm1:chinese_vocab.model   words joined with spaces and given to SentencePiece
  sentencepiece:spiece.model plain SentencePiece, as T5 and mT5 use it; ?extra_ids=100 sentinels

CPM-2's published files come in two forms, told apart by their pieces. The Chinese one (no '##') folds full-width characters to
half-width and keeps every space as a token. The bilingual one writes what continues a word that is not Chinese as '##piece',
folds nothing, and leaves out a space between two tokens that are not Chinese. `train` can make a third form: the bilingual
one with the 256 bytes as pieces, which loses nothing (see `Lossless`).

Ids are those of the released code (CPM-2: tokenization_enc_dec.py of CPM-2-Finetune for Chinese, its _encn variant for the
bilingual form), even where that loses something: a word of more than 200 characters is one `<unk>`, and in the bilingual form
so is a character inside a word for which there is no '##' piece, such as the % of '5%'. One thing is left out on purpose: the
released bilingual encoder repeats the token of a text that has only one.
"""

import difflib
import os
from typing import Any

from t5x_cpm import stored
from t5x_cpm.config import ConfigError, ModelConfig
from t5x_cpm.vocabularies.base import BLANK, Vocabulary, fingerprint, read
from t5x_cpm.vocabularies.cpm2 import Cpm2, Lossless
from t5x_cpm.vocabularies.sentencepiece import Cpm1, SentencePiece

__all__ = ['BLANK', 'Vocabulary', 'check_saved', 'check_size', 'load', 'load_saved']

# A model may have fewer than this many rows beyond the pieces of its vocabulary, so that a mesh can divide its table.
PADDING = 128

_RESTORE = 'Restore the folder from a copy, or write it anew by resuming the run: it copies its vocabulary again.'
_KINDS: dict[str, type[Vocabulary]] = {cls.kind: cls for cls in (Cpm2, Cpm1, SentencePiece)}


def _make(kind: str, path: str, options: dict[str, str]) -> Vocabulary:
  if kind == 'cpm2' and b'<0x00>' in read(path):
    return Lossless(path, options)
  return _KINDS[kind](path, options)


def load(spec: str) -> Vocabulary:
  """The vocabulary of a spec; see the head of this file.

  Raises:
    ConfigError: unknown kind, or a file that is missing or not of this kind.
  """
  kind, colon, rest = spec.partition(':')
  if not colon or kind not in _KINDS:
    near = difflib.get_close_matches(kind, _KINDS, n=1)
    hint = f' Did you mean {near[0]}:?' if near else ''
    raise ConfigError(f'TaskConfig.vocabulary = {spec!r}: expected {", ".join(f"{name}:FILE" for name in _KINDS)}.{hint}')
  path, _, query = rest.partition('?')
  options = dict(option.partition('=')[::2] for option in query.split('&') if option)
  return _make(kind, path, options)


def check_saved(directory: Any, expected: str | None = None, remedy: str = _RESTORE) -> tuple[str, str, dict[str, str]]:
  """Checks that a folder holds what `Vocabulary.save` wrote there, without loading it.

  Args:
    directory: the folder.
    expected: the fingerprint of the vocabulary that should be there; None: that which was saved.
    remedy: what errors tell the user to do.

  Returns:
    The kind of the vocabulary, the path of its file, and its options.

  Raises:
    ConfigError: there is no vocabulary, and none is expected.
    DamagedError: it is not the one that was saved, or that is expected.
  """
  from etils import epath

  path = epath.Path(directory) / 'vocabulary.json'
  if expected is None and not os.path.lexists(path) and not path.exists():
    raise ConfigError(f'{directory} holds no vocabulary (no vocabulary.json). {remedy}')
  saved = stored.read(path, {'kind': tuple(_KINDS), 'file': stored.is_plain_name, 'options': {str: str}, 'fingerprint?': str},
                      remedy, 'fingerprint')
  file = epath.Path(directory) / saved['file']
  found = fingerprint(saved['kind'], saved['options'], stored.content(file, remedy))
  for wanted in (saved.get('fingerprint'), expected):
    if wanted is not None and found != wanted:
      raise stored.DamagedError(file, f'its fingerprint is {found}, expected {wanted}', remedy)
  return saved['kind'], str(file), saved['options']


def load_saved(directory: Any, expected: str | None = None, remedy: str = _RESTORE) -> Vocabulary:
  """The vocabulary that `Vocabulary.save` wrote to a folder. Arguments and errors as in `check_saved`."""
  return _make(*check_saved(directory, expected, remedy))


def check_size(model: ModelConfig, vocabulary: Vocabulary) -> None:
  """Raises ConfigError unless the model has a row for each piece of the vocabulary, and no more than padding beyond them."""
  rows, pieces = model.vocab_size, vocabulary.size
  if not 0 <= rows - pieces < PADDING:
    raise ConfigError(
        f'ModelConfig.vocab_size = {rows}, but the vocabulary {vocabulary.spec} has {pieces} pieces: set '
        f'ModelConfig.vocab_size = {pieces} (up to {PADDING - 1} more are allowed as padding).')
