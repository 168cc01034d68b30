"""Metrics of generated answers. A SeqIO metric takes (targets, predictions) and returns a dict of numbers."""

import collections
import re
import unicodedata

_PUNCTUATION = re.compile(r'(?![-./]\d)(?!(?<=\d)%)[^\w]')


def normalize(text: str) -> str:
  """Turns full-width forms into ASCII, and drops case, white space and punctuation, except in numbers such as -3.5 or 20%.

  White space is dropped because Chinese is written without it.
  """
  text = unicodedata.normalize('NFKC', text).lower()
  text = _PUNCTUATION.sub(lambda match: match[0] if unicodedata.category(match[0])[0] not in 'PZC' else '', text)
  return text.replace('_', '')


def exact_match(targets: list[str], predictions: list[str]) -> dict[str, float]:
  """Share of answers that equal their target once normalized."""
  hits = sum(normalize(target) == normalize(prediction) for target, prediction in zip(targets, predictions))
  return {'exact_match': hits / max(len(targets), 1)}


def char_f1(targets: list[str], predictions: list[str]) -> dict[str, float]:
  """Mean F1 of the characters of answer and target as bags, from 0 to 1: CMRC 2018's measure, but for the order."""
  total = 0.0
  for target, prediction in zip(targets, predictions):
    a, b = collections.Counter(normalize(target)), collections.Counter(normalize(prediction))
    common = (a & b).total()
    total += 2 * common / (a.total() + b.total()) if a or b else 1.0
  return {'char_f1': total / max(len(targets), 1)}
