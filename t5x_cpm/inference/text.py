"""How a text becomes what the model reads, and how what the model writes becomes a text. Pure Python.

A model that was trained by span corruption fills blanks, and an input without any blank is continued. T5's rule masks the end
of every piece, so that all training inputs end with a masked span. Therefore an input that does not end with a blank gets one
more, which asks for what would follow, and the answer is cut where the model reaches it. 'isolated' masks anywhere: its inputs
end with a blank or, like a whole document, with the end of document. (Runs of 'isolated' that began in an earlier version
followed T5's rule.)
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from t5x_cpm.config import Config, ConfigError, row_features
from t5x_cpm.data.pieces import SPANS
from t5x_cpm.vocabularies import BLANK, Vocabulary

_SENTINEL = re.compile(r'<(?:s|extra_id)_\d+>')  # as people and T5's files write it


class Request(NamedTuple):
  """An input as the model reads it.

  Attributes:
    text: as it was given.
    ids: the tokens that the encoder reads.
    blanks: how many the answer must fill; 0 for a task of pairs, whose answer is one text.
    stop: tokens that end the answer.
    row: what the row carries besides tokens, by the names of config.row_features.
    prefix: tokens that the decoder reads before it writes, at least one.
    is_cut: whether the text was too long and its end is not among the tokens.
  """

  text: str
  ids: list[int]
  blanks: int
  stop: tuple[int, ...]
  row: Mapping[str, int]
  prefix: tuple[int, ...]
  is_cut: bool = False


def fill(text: str, texts: Sequence[str]) -> str:
  """Puts texts in the places of the blanks of a text. Where two spaces meet at a seam, one is dropped."""
  filled, *rest = text.split(BLANK)
  for given, following in zip(texts, rest, strict=True):
    for piece in (given, following):
      filled += piece[1:] if filled.endswith(' ') and piece.startswith(' ') else piece
  return filled


class Codec:
  """The form of inputs and answers on which an objective trains a model.

  Attributes:
    vocabulary: the model's vocabulary.
    row: what the row of a request carries besides tokens.
    prefix: tokens that the decoder reads before it writes.
    end: tokens with which inputs and targets end.
    is_pairs: whether the model was trained on inputs and targets; else it fills blanks.
    masks_anywhere: whether training inputs need not end with a masked span.
  """

  def __init__(self, vocabulary: Vocabulary, config: Config, row: Mapping[str, int] | None = None,
               info: Mapping[str, Any] | None = None):
    """The codec of a run.

    Args:
      vocabulary: the model's vocabulary.
      config: the run's configuration; TaskConfig.objective, and input_length and truncate of InferConfig, are read.
      row: what rows carry besides tokens; by default what the configuration says.
      info: what a checkpoint says about its run beside the configuration (`RunInfo.info`), such as by which rule it masked.
    """
    self.vocabulary, self.limits = vocabulary, config.infer
    self.row = row_features.defaults(config) if row is None else row
    self.prefix = (vocabulary.bos_id,)
    self.is_pairs = config.task.objective == 'pairs'
    self.end = [vocabulary.eos_id] if config.task.objective in ('t5', 'pairs') else []
    self.masks_anywhere = config.task.objective == 'isolated' and SPANS in (info or {}).get('data', {})
    self._number = {token: k for k, token in enumerate(vocabulary.sentinels)}

  def request(self, text: str) -> Request:
    """Encodes an input.

    Raises:
      ConfigError: it has more blanks than the vocabulary has sentinels, or more tokens than InferConfig.input_length.
    """
    vocabulary = self.vocabulary
    if self.is_pairs:
      return self.pairs_request(text, vocabulary.encode_blanks(text))
    form = text if BLANK in text else text + BLANK
    blanks = form.count(BLANK)
    if blanks >= len(vocabulary.sentinels):
      raise ConfigError(f'the input has {blanks} blanks; the vocabulary has sentinels for {len(vocabulary.sentinels) - 1}.')
    closing = vocabulary.sentinels[blanks]
    ids = vocabulary.encode_blanks(form)
    if ids[-1] not in self._number:
      ids = [*ids, vocabulary.eos_id if self.masks_anywhere else closing]
    return self.fit(Request(text, ids + self.end, blanks, (vocabulary.eos_id, closing), self.row, self.prefix))

  def pairs_request(self, text: str, ids: list[int]) -> Request:
    """An input of a model that was trained on inputs and targets, from its tokens without end of sequence."""
    return self.fit(Request(text, ids + self.end, 0, (self.vocabulary.eos_id,), self.row, self.prefix))

  def fit(self, request: Request) -> Request:
    """Refuses an input that is too long, or cuts it: its last sentinel and the end of sequence stay at its end.

    Raises:
      ConfigError: it is too long and InferConfig.truncate is False, or cutting it would lose a blank.
    """
    limit, given = self.limits.input_length, f'the input has {len(request.ids)} tokens'
    if len(request.ids) <= limit:
      return request
    if not self.limits.truncate:
      raise ConfigError(
          f'{given} and InferConfig.input_length = {limit}: raise it, or set InferConfig.truncate = True to cut such inputs.')
    tail = [token for token in request.ids[-2:] if token in self.end or token in self._number]
    ids = request.ids[:limit - len(tail)] + tail
    lost = request.blanks - len(set(self.vocabulary.sentinels[:request.blanks]) & set(ids))
    if lost:
      raise ConfigError(f'{given}; cut to InferConfig.input_length = {limit} it would lose {lost} of its {request.blanks} '
                        'blanks: raise InferConfig.input_length.')
    return request._replace(ids=ids, is_cut=True)

  def targets(self, request: Request, target: str | Sequence[str]) -> list[int]:
    """The tokens of a given answer.

    Args:
      request: what it answers.
      target: the text of each blank; one text where there is one blank, or for a task of pairs. The sentinels before, between
        and after the texts are added here.

    Raises:
      ConfigError: there are more or fewer texts than blanks, or a text contains the name of a sentinel.
    """
    vocabulary = self.vocabulary
    if self.is_pairs:
      if not isinstance(target, str):
        raise ConfigError(f'the target {target!r} is not one text, but the model was trained on inputs and targets.')
      return vocabulary.encode(target) + self.end
    texts = [target] if isinstance(target, str) else list(target)
    if len(texts) != request.blanks:
      raise ConfigError(f'{len(texts)} texts for the {request.blanks} blanks of {request.text!r}: give one for each.')
    for text in texts:
      if found := _SENTINEL.search(text):
        raise ConfigError(f'the target {text!r} has {found[0]} in it, which would be read as characters: give the text of each '
                          'blank alone, sentinels are put around it.')
    ids = []
    for sentinel, text in zip(vocabulary.sentinels, texts):
      ids += [sentinel, *vocabulary.encode(text)]
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
    return (fill(request.text, texts) if BLANK in request.text else texts[0]), texts

  def before_stop(self, request: Request, ids: Sequence[int]) -> list[int]:
    """Generated tokens without the stop token and what follows it."""
    ends = [i for i, token in enumerate(ids) if token in request.stop]
    return [int(token) for token in ids[:ends[0] if ends else len(ids)]]
