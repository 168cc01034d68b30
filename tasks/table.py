"""What a row of the tables of tasks holds."""

import dataclasses
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class Row:
  """A task. The text of a document comes from `source`; a task of pairs has inputs and targets."""

  name: str
  text: str  # what it is, for `t5x_cpm tasks`
  kind: str  # where documents come from: 'quickstart', 'tfds' or 'local'
  source: str = ''  # of 'tfds' the builder, of 'quickstart' the part of the corpus
  splits: Mapping[str, str] = dataclasses.field(default_factory=dict)  # of 'tfds': our split -> the builder's
  field: str = ''  # of 'tfds': the feature with the text; '' is the only text feature
  vocabulary: str = ''  # used when TaskConfig.vocabulary is ''
  pairs: bool = False
  metrics: tuple[str, ...] = ()  # functions of tasks/metrics.py


@dataclasses.dataclass(frozen=True)
class MixtureRow:
  """A mixture of other rows; rates are shares of the rows of a batch."""

  name: str
  text: str
  rates: Mapping[str, float]
  kind: str = 'mixture'
  vocabulary: str = ''
