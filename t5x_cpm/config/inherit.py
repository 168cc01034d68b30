"""The configuration of growth: how a new model is made from what a trained one has learned."""

import dataclasses

from t5x_cpm.config.fields import ConfigError, choice, free, in_range, shown
from t5x_cpm.config.typed import Typed

MAKES_EXPERTS = ('experts', 'merge_models_into_experts')
# The growths that read an option: it would do nothing without one of them.
READ_BY = {'expert_noise': MAKES_EXPERTS, 'expert_reinit': MAKES_EXPERTS, 'keep_experts': ('prune_experts',),
           'deepen': ('deepen',), 'new_layers': ('deepen',), 'widen_noise': ('widen',)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class InheritConfig(Typed):
  """How `inherit` makes the parameters of a new model from those of a source. ModelConfig and TaskConfig say what is new."""

  # what grows, one after the other: 'vocabulary', 'unshare_layers', 'deepen', 'widen', 'experts', 'prune_experts'; first and
  # for several sources 'average' or 'merge_models_into_experts'
  growth: tuple[str, ...] = free(())
  seed: int = free(0)  # of what is drawn: rows of pieces that have no prefix in the old vocabulary, routers, noise
  deepen: str = free('stack')  # of 'deepen': new layers on top ('stack'), or each after the one it is made of ('interleave')
  new_layers: str = free('identity')  # of 'deepen': new layers change nothing at first ('identity') or are copies ('copy')
  # of 'widen': noise on copies of hidden units and of heads, as a share of the standard deviation of their matrix; without
  # any, equal units stay equal
  widen_noise: float = free(0.0)
  expert_noise: float = free(0.0)  # of 'experts': noise on each copy, as a share of the standard deviation of its matrix
  expert_reinit: float = free(0.0)  # of 'experts': the share of the hidden units of each expert that is drawn anew
  keep_experts: tuple[int, ...] = free(())  # of 'prune_experts': which ones, in their new order; (): the first ones

  def validate(self) -> None:
    if len(set(self.growth)) < len(self.growth):
      raise ConfigError(f'InheritConfig.growth = {shown(self.growth)}: expected different names.')
    in_range(self, 'seed', 0)
    choice(self, 'deepen', ('stack', 'interleave'))
    choice(self, 'new_layers', ('identity', 'copy'))
    in_range(self, 'widen_noise', 0.0)
    in_range(self, 'expert_noise', 0.0)
    in_range(self, 'expert_reinit', 0.0, 1.0)
    if min(self.keep_experts, default=0) < 0 or len(set(self.keep_experts)) < len(self.keep_experts):
      raise ConfigError(f'InheritConfig.keep_experts = {shown(self.keep_experts)}: expected different numbers, from 0.')
    for field, readers in READ_BY.items():
      value = getattr(self, field)
      if value != getattr(type(self), field) and not set(readers) & set(self.growth):
        names = ' and '.join(map(repr, readers))
        raise ConfigError(f'InheritConfig.{field} = {shown(value)} is read by growth {names} alone, and InheritConfig.growth = '
                          f'{shown(self.growth)}.')
