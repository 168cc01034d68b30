"""The configuration of growth: how a new model is made from what a trained one has learned."""

import dataclasses

from t5x_cpm.config.fields import ConfigError, free, in_range, shown
from t5x_cpm.config.typed import Typed


@dataclasses.dataclass(frozen=True, kw_only=True)
class InheritConfig(Typed):
  """How `inherit` makes the parameters of a new model from those of a source. ModelConfig and TaskConfig say what is new."""

  growth: tuple[str, ...] = free(())  # what grows, one after the other: 'vocabulary', 'experts'
  seed: int = free(0)  # of what is drawn: rows of pieces that have no prefix in the old vocabulary, routers, noise
  expert_noise: float = free(0.0)  # of 'experts': noise on each copy, as a share of the standard deviation of its matrix

  def validate(self) -> None:
    if len(set(self.growth)) < len(self.growth):
      raise ConfigError(f'InheritConfig.growth = {shown(self.growth)}: expected different names.')
    in_range(self, 'seed', 0)
    in_range(self, 'expert_noise', 0.0)
