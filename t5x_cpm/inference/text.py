"""How a text becomes what the model reads, and how what the model writes becomes a text. Pure Python.

A model that was trained by span corruption fills blanks, and an input without any blank is continued. An input that does not
end with a blank gets one more, which asks for what would follow, and the answer is cut where the model reaches it. T5's rule
masks the end of every piece, so that all its inputs are so. Where spans may lie anywhere, a text with a single blank is still
much shorter in training than most that users write: models fill it better in this form than where it ends as a document does.

A model that was trained on inputs and targets, or to continue texts, knows no blanks: whatever is written in its inputs is
text. Where its targets stood between sentinels (TaskConfig.target_form = 'span'), the first sentinel ends its inputs. A model
with a prompt of several parts has each where the input says <prompt>; one part may be left out, and then stands before the
input.
"""

import dataclasses
import itertools
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from t5x_cpm.config import Config, ConfigError, row_features
from t5x_cpm.config.fields import shown
from t5x_cpm.config.template import PROMPT
from t5x_cpm.vocabularies import BLANK, Vocabulary

_SENTINEL = re.compile(r'<(?:s|extra_id)_\d+>')  # as people and T5's files write it
# How other models and other keyboards write a blank. '____' is left out, and 'rows[mask]', which programs have.
_LIKE_BLANK = re.compile(
    r'<\s*(?:(?:span|mask)(?:_?\d+)?|blank|(?:s|extra_id|sentinel)_\d+|\|mask\|)\s*/?>|'
    r'(?<![A-Za-z0-9_)\]])\[\s*(?:[gs]?mask|blank|span)\s*\]|(?-i:\[(?:[gs]?MASK|BLANK)\])', re.IGNORECASE)
_HALF_WIDTH = {code: code - 0xfee0 for code in range(0xff01, 0xff5f)} | str.maketrans('\u3000〈〉⟨⟩【】', ' <><>[]')
_SURROGATE = re.compile('[\ud800-\udfff]')
MARK = -1  # among the tokens of an input, before it is fitted: the place of a part of a prompt
_FAR_TOO_LONG = (1_000_000, 1000)  # characters of a text, and characters for each token of the input


class Request(NamedTuple):
  """An input as the model reads it.

  Attributes:
    text: as it was given.
    ids: the tokens that the encoder reads.
    blanks: how many the answer must fill; 0 for a task of pairs, whose answer is one text.
    stop: tokens that end the answer.
    row: what the row carries besides tokens, by the names of config.row_features.
    prefix: tokens that the decoder reads before it writes, at least one.
    note: what its writer should know, '' for nothing.
    is_cut: whether the text was too long and its end is not among the tokens.
    delta: the name of the delta that answers it, '' for none.
  """

  text: str
  ids: list[int]
  blanks: int
  stop: tuple[int, ...]
  row: Mapping[str, int]
  prefix: tuple[int, ...]
  note: str = ''
  is_cut: bool = False
  delta: str = ''


def fill(text: str, texts: Sequence[str]) -> str:
  """Puts texts in the places of the blanks of a text. Where two spaces meet at a seam, one is dropped."""
  filled, *rest = text.split(BLANK)
  for given, following in zip(texts, rest, strict=True):
    for piece in (given, following):
      filled += piece[1:] if filled.endswith(' ') and piece.startswith(' ') else piece
  return filled


def like_blank(text: str) -> str:
  """The first mark of a text that was probably meant as a blank, but is none, such as '<SPAN>' or '[MASK]'; '' if none."""
  for match in _LIKE_BLANK.finditer(text.translate(_HALF_WIDTH)):
    if (found := text[match.start():match.end()]) != BLANK:
      return found
  return ''


def tell_notes(requests: Iterable[Request], name: str) -> bool:
  """Prints the first note of some requests to stderr, and how many have one.

  Args:
    requests: in the order in which they were given.
    name: where they come from.

  Returns:
    Whether there was one.
  """
  notes = [request.note for request in requests if request.note]
  if notes:
    more = f' ({len(notes):,} inputs have such marks.)' if len(notes) > 1 else ''
    print(f'warning: {name}: {notes[0]}{more}', file=sys.stderr, flush=True)
  return bool(notes)


def of_model(config: Config, trained: Config) -> Config:
  """A configuration with what belongs to the model: hyperparameters, delta, and the objective that gave texts their form.

  Args:
    config: how to decode, on which mesh, where the base of a delta lies now ('': where it was) and whether it may be another
      one, how many slots for deltas there are, and how to read a task; its objective says no more than that.
    trained: the configuration of the model's own run.
  """
  task = dataclasses.replace(config.task, objective=trained.task.objective, target_form=trained.task.target_form)
  delta = dataclasses.replace(trained.delta, base=config.delta.base or trained.delta.base, slots=config.delta.slots,
                              allow_other_base=config.delta.allow_other_base)
  return dataclasses.replace(config, model=trained.model, task=task, delta=delta)


def _expanded(ids: Sequence[int], parts: Sequence[int], first: int) -> list[int]:
  """Tokens with those of a prompt, from `first` on, in the place of each MARK."""
  tokens, sizes, out = itertools.count(first), iter(parts), list[int]()
  for token in ids:
    out += itertools.islice(tokens, next(sizes)) if token == MARK else (token,)
  return out


class Codec:
  """The form of inputs and answers on which an objective trains a model.

  Attributes:
    vocabulary: the model's vocabulary.
    row: what the row of a request carries besides tokens.
    prefix: tokens that the decoder reads before it writes.
    end: tokens with which inputs and targets end.
    parts: how many tokens, which stand for the vectors of a delta, take the place of each <prompt> of an input.
    is_pairs: whether the model was trained on inputs and targets, its own or the two parts of a text; else it fills blanks.
    is_span: whether these targets stood between sentinels.
  """

  def __init__(self, vocabulary: Vocabulary, config: Config, row: Mapping[str, int] | None = None):
    """The codec of a run.

    Args:
      vocabulary: the model's vocabulary.
      config: the run's configuration; objective and target_form of TaskConfig, input_length and truncate of InferConfig, and
        what says how many tokens a delta puts into every input are read.
      row: what rows carry besides tokens; by default what the configuration says.
    """
    self.vocabulary, self.limits = vocabulary, config.infer
    self.row = row_features.defaults(config) if row is None else row
    vectors = range(config.model.vocab_size, config.model.vocab_size + config.delta.vectors)
    self.prefix = (*vectors[config.delta.prompts:], vocabulary.bos_id)
    self.is_pairs = config.task.objective in ('pairs', 'prefix_lm')
    self.is_span = self.is_pairs and config.task.target_form == 'span'
    self.end = [vocabulary.eos_id] if config.task.objective in ('t5', 'pairs', 'prefix_lm') and not self.is_span else []
    self.parts, self._first_vector = config.delta.parts, config.model.vocab_size
    self._number = {token: k for k, token in enumerate(vocabulary.sentinels)}

  def check(self, text: str, what: str) -> None:
    """Refuses a text that training would have refused, or that is far longer than any input.

    The latter before it is cut into words, which takes a second for a million characters.

    Raises:
      ConfigError: so it is. The message calls the text `what`.
    """
    room = self.limits.input_length
    most = max(_FAR_TOO_LONG[0], _FAR_TOO_LONG[1] * room)
    if len(text) > most:
      raise ConfigError(f'{what} has {len(text):,} characters, and InferConfig.input_length = {room} tokens: expected at most '
                        f'{most:,} characters')
    if half := _SURROGATE.search(text):
      raise ConfigError(f'{what} holds half of a surrogate pair, U+{ord(half[0]):04X}: no file of text can have it')

  def input_ids(self, text: str) -> list[int]:
    """The tokens of an input, as training has them: without a sentinel for what would follow, and without end of sequence.

    Raises:
      ConfigError: as in `check`, or it has more blanks than the vocabulary has sentinels.
    """
    self.check(text, 'the input')
    return self._marked_ids(text, bool(self.parts)) if self.is_pairs else self.vocabulary.encode_blanks(text)

  def _marked_ids(self, text: str, has_marks: bool) -> list[int]:
    """The tokens of the inputs of a pair, with MARK in each place of a prompt.

    Raises:
      ConfigError: the prompt has other parts than the text has places.
    """
    first, *others = map(self.vocabulary.encode, text.split(PROMPT) if has_marks else [text])
    ids = list(itertools.chain(first, *([MARK, *other] for other in others)))
    if not self.parts:
      return [token for token in ids if token != MARK]
    if not others and len(self.parts) == 1:
      return [MARK, *ids]
    if len(others) != len(self.parts):
      raise ConfigError(f'the input has {len(others)} times {PROMPT}, and the prompt of the model {len(self.parts)} parts: '
                        "mark the place of each, as the LocalTaskConfig.inputs_template of its run does.")
    return ids

  def encoder_ids(self, text: str) -> tuple[list[int], list[int]]:
    """The tokens that the encoder reads of an input of any length, without a sentinel for what would follow; and where among
    them the input itself stands. Raises as `input_ids` does."""
    ids = _expanded(self.input_ids(text) + self.end, self.parts, self._first_vector)
    return ids, [place for place, token in enumerate(ids) if token < self._first_vector]

  def request(self, text: str) -> Request:
    """Encodes an input.

    Raises:
      ConfigError: it has more blanks than the vocabulary has sentinels, more tokens than InferConfig.input_length, or is
        refused by `check`.
    """
    vocabulary = self.vocabulary
    if self.is_pairs:
      return self._pairs_request(text, self.input_ids(text))
    self.check(text, 'the input')
    form = text if BLANK in text else text + BLANK
    blanks = form.count(BLANK)
    if blanks >= len(vocabulary.sentinels):
      raise ConfigError(f'the input has {blanks} blanks; the vocabulary has sentinels for {len(vocabulary.sentinels) - 1}.')
    closing = vocabulary.sentinels[blanks]
    ids = vocabulary.encode_blanks(form)
    if ids[-1] not in self._number:
      ids = [*ids, closing]
    found = like_blank(text)
    note = f'{found!r} is read as plain text; a blank is written {BLANK}.' if found else ''
    return self.fit(Request(text, ids + self.end, blanks, (vocabulary.eos_id, closing), self.row, self.prefix, note))

  def task_request(self, text: str, ids: list[int] | None) -> Request:
    """An input of a task for a model that was trained on pairs.

    Args:
      text: of the input; without `ids`, PROMPT marks places in it, which a model without a prompt has nothing for.
      ids: its tokens, as the task gives them, without end of sequence.
    """
    if ids is None:
      return self._pairs_request(text.replace(PROMPT, ''), self._marked_ids(text, True))
    return self._pairs_request(text, [MARK] * len(self.parts) + ids)

  def _pairs_request(self, text: str, ids: list[int]) -> Request:
    eos, sentinels = self.vocabulary.eos_id, self.vocabulary.sentinels
    if self.is_span:
      return self.fit(Request(text, [*ids, sentinels[0]], 1, (eos, sentinels[1]), self.row, self.prefix))
    return self.fit(Request(text, ids + self.end, 0, (eos,), self.row, self.prefix))

  def fit(self, request: Request) -> Request:
    """Refuses an input that is too long, or cuts it: its last sentinel and the end of sequence stay at its end.

    Then the prompt of a delta is put into it, which the limit does not count.

    Raises:
      ConfigError: it is too long and InferConfig.truncate is False, or cutting it would lose a blank.
    """
    def with_prompt(ids: list[int]) -> list[int]:
      return _expanded(ids, self.parts, self._first_vector)

    limit, size = self.limits.input_length, sum(token != MARK for token in request.ids)
    given = f'the input has {size} tokens'
    if size <= limit:
      return request._replace(ids=with_prompt(request.ids))
    if not self.limits.truncate:
      raise ConfigError(
          f'{given} and InferConfig.input_length = {limit}: raise it, or set InferConfig.truncate = True to cut such inputs.')
    tail = [token for token in request.ids[-2:] if token in self.end or request.blanks and token in self._number]
    text_ids = itertools.count(len(tail))
    ids = [token for token in request.ids[:len(request.ids) - len(tail)] if token == MARK or next(text_ids) < limit] + tail
    lost = request.blanks - len(set(self.vocabulary.sentinels[:request.blanks]) & set(ids))
    if lost:
      raise ConfigError(f'{given}; cut to InferConfig.input_length = {limit} it would lose {lost} of its {request.blanks} '
                        'blanks: raise InferConfig.input_length.')
    return request._replace(ids=with_prompt(ids), is_cut=True)

  def targets(self, request: Request, target: str | Sequence[str]) -> list[int]:
    """The tokens of a given answer.

    Args:
      request: what it answers.
      target: the text of each blank; one text where there is one blank, or for a task of pairs. The sentinels before, between
        and after the texts are added here.

    Raises:
      ConfigError: there are more or fewer texts than blanks, a text contains the name of a sentinel, or is refused by `check`.
    """
    vocabulary = self.vocabulary
    for text in [target] if isinstance(target, str) else target:
      self.check(text, 'the target')
    if self.is_pairs:
      if not isinstance(target, str):
        raise ConfigError(f'the target {shown(target)} is not one text, but the model was trained on inputs and targets.')
      ids = vocabulary.encode(target)
      return [vocabulary.sentinels[0], *ids, vocabulary.sentinels[1]] if self.is_span else ids + self.end
    texts = [target] if isinstance(target, str) else list(target)
    if len(texts) != request.blanks:
      raise ConfigError(f'{len(texts)} texts for the {request.blanks} blanks of {shown(request.text)}: give one for each.')
    for text in texts:
      if found := _SENTINEL.search(text):
        raise ConfigError(f'the target {shown(text)} has {found[0]} in it, which would be read as characters: give the text of '
                          'each blank alone, sentinels are put around it.')
    # What stands before a blank may decide how its text begins. A continuation is a text of its own.
    before = request.text.split(BLANK) if BLANK in request.text else ['']
    ids = []
    for number, (sentinel, text) in enumerate(zip(vocabulary.sentinels, texts)):
      ids += [sentinel, *vocabulary.encode_after(before[number] or (texts[number - 1] if number else ''), text)]
    return ids + (self.end or [vocabulary.sentinels[request.blanks]])

  def forbidden(self, request: Request) -> list[int]:
    """Tokens that cannot be part of an answer: padding, start, unknown, and the sentinels past the closing one."""
    vocabulary = self.vocabulary
    tokens = {vocabulary.pad_id, vocabulary.bos_id, vocabulary.unk_id} - {vocabulary.eos_id}
    return sorted(tokens) + (list(vocabulary.sentinels[request.blanks + 1:]) if request.blanks else [])

  def fills(self, request: Request, ids: Sequence[int]) -> list[str]:
    """The texts of the blanks in generated tokens. What stands before the first sentinel belongs to the first blank."""
    filled: list[list[int]] = [[] for _ in range(request.blanks)]
    current = 0
    for token in self.before_stop(request, ids):
      number = self._number.get(token)
      if number is None:
        filled[current].append(token)
      elif number < request.blanks:
        current = number
    return [self.vocabulary.decode(tokens) for tokens in filled]

  def output(self, request: Request, ids: Sequence[int]) -> tuple[str, list[str]]:
    """What to show for generated tokens.

    Returns:
      The input with its blanks filled, or for an input without blanks what the model wrote; and the texts of the blanks.
    """
    if not request.blanks:
      return self.vocabulary.decode(self.before_stop(request, ids)), []
    texts = self.fills(request, ids)
    return (fill(request.text, texts) if BLANK in request.text and not self.is_pairs else texts[0]), texts

  def shown(self, request: Request, ids: Sequence[int]) -> str:
    """Generated tokens as one text; where there are several blanks, '<s_k>' announces the k-th."""
    hidden = self.vocabulary.sentinels[0] if request.blanks == 1 else None
    return self.vocabulary.decode([token for token in self.before_stop(request, ids) if token != hidden])

  def before_stop(self, request: Request, ids: Sequence[int]) -> list[int]:
    """Generated tokens without the stop token and what follows it."""
    ends = [i for i, token in enumerate(ids) if token in request.stop]
    return [int(token) for token in ids[:ends[0] if ends else len(ids)]]
