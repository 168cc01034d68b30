"""The rows of the tables of tasks."""

import dataclasses
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class Row:
  """A task. Its documents are texts, or inputs and targets in a task of pairs."""

  name: str
  text: str  # a line about it, for `t5x_cpm tasks`
  kind: str  # where documents come from: 'quickstart', 'tfds' or 'local'
  source: str = ''  # for 'tfds': the builder; for 'quickstart': which texts of the corpus
  splits: Mapping[str, str] = dataclasses.field(default_factory=dict)  # for 'tfds': our split -> the builder's
  field: str = ''  # for 'tfds': the feature with the text; '' is 'text', or the only text feature
  vocabulary: str = ''  # used when TaskConfig.vocabulary is ''
  pairs: bool = False
  metrics: tuple[str, ...] = ()  # functions of tasks/metrics.py


@dataclasses.dataclass(frozen=True)
class MixtureRow:
  """A mixture of other rows of the tables. Rates are shares of the rows of a batch."""

  name: str
  text: str
  rates: Mapping[str, float]
  kind: str = 'mixture'
  vocabulary: str = ''
