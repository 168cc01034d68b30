"""The configuration of InfMoE: how a model whose experts do not fit the device is stored and run."""

import dataclasses

from t5x_cpm.config.fields import ConfigError, choice, free, in_range
from t5x_cpm.config.typed import Typed

FORMATS = ('float32', 'bfloat16', 'int8', 'int4')


@dataclasses.dataclass(frozen=True, kw_only=True)
class OffloadConfig(Typed):
  """How `bundle` stores a model with experts, and how a bundle is run where they do not fit in memory."""

  # how the matrices of experts are stored: 'float32', 'bfloat16', 'int8' (a scale for each output) or 'int4' (a scale for each
  # group of inputs to an output)
  format: str = free('int8')
  dense_format: str = free('float32')  # how all other matrices of layers are stored, but for those of routers
  group: int = free(64)  # of 'int4': how many numbers share a scale: 64, 128, or 0 for all inputs to an output
  memory_gib: float = free(0.0)  # what the model may take in memory, its other weights included; 0: what is free
  # where experts are: in the files, mapped into memory ('mapped', for what fits there); read into memory of a fixed size when
  # they are needed ('slots'); 'auto': 'slots' if memory_gib is given or the bundle does not fit, else 'mapped'
  store: str = free('auto')
  staging: int = free(3)  # of 'slots': how many experts may be on their way at once; what else there is room for is kept
  readers: int = free(3)  # of 'slots': threads that read
  # of 'slots': in which order the experts of a layer are read: 'longest_first', by how many tokens go to them, or 'index'
  order: str = free('longest_first')
  read_ahead: bool = free(True)  # of 'slots': begin to read the next layer of the encoder while one is computed
  warm_up: bool = free(True)  # of 'slots': fill what is free for the decoder while the encoder ends
  # of 'slots': guess the experts of the decoder's next layer, and read them before it is known: 'auto' (where enough guesses
  # are right), 'on' or 'off'
  guess: str = free('auto')
  read_seconds: float = free(60.0)  # of 'slots': when an expert that is not there is given up

  def validate(self) -> None:
    choice(self, 'format', FORMATS)
    choice(self, 'dense_format', FORMATS)
    if self.group not in (0, 64, 128):
      raise ConfigError(f'OffloadConfig.group = {self.group}: expected 64, 128, or 0 for a scale for each output.')
    choice(self, 'store', ('auto', 'mapped', 'slots'))
    choice(self, 'order', ('longest_first', 'index'))
    choice(self, 'guess', ('auto', 'on', 'off'))
    in_range(self, 'memory_gib', 0.0)
    in_range(self, 'staging', 2, 64)
    in_range(self, 'readers', 1, 64)
    in_range(self, 'read_seconds', 0.1, 86400.0)
    if self.memory_gib and self.store == 'mapped':
      raise ConfigError("OffloadConfig.memory_gib is for store = 'slots': the system decides what it keeps of mapped files. "
                        "Leave it at 0, or set store to 'slots'.")
