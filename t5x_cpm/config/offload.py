"""The configuration of InfMoE: how a model whose experts do not fit the device is stored and run."""

import dataclasses

from t5x_cpm.config.fields import choice, free
from t5x_cpm.config.typed import Typed

FORMATS = ('float32', 'bfloat16', 'int8', 'int4')


@dataclasses.dataclass(frozen=True, kw_only=True)
class OffloadConfig(Typed):
  """How `bundle` stores a model with experts, so that it can be run where they do not fit in memory."""

  # how the matrices of experts are stored: 'float32', 'bfloat16', 'int8' (a scale for each output) or 'int4' (a scale for each
  # group of inputs to an output)
  format: str = free('int8')
  group: int = free(64)  # of 'int4': how many numbers share a scale: 64, 128, or 0 for all inputs to an output

  def validate(self) -> None:
    choice(self, 'format', FORMATS)
    choice(self, 'group', (0, 64, 128))
