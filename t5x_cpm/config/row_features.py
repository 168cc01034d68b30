"""What a row of a batch carries beside its tokens: whole numbers by name, such as the domain that a router goes by.

A request or the reader gives them, and under the same names they stand in the batch (int32 [B]), in what every layer sees
(`Context.row`, [B, T]) and in the cache of a decoder ([1, B]). A new one is one row of ROW_FEATURES; whatever uses it looks it
up by name.
"""

import dataclasses
from collections.abc import Callable, Mapping

from t5x_cpm.config.fields import ConfigError
from t5x_cpm.config.run import Config


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowFeature:
  """One number that a row carries.

  Attributes:
    needed: config -> whether anything reads it. Batches have it only then.
    default: config -> its value for a row of which nothing else is known.
    from_task: (config, number of a task in its mixture, tasks of the mixture) -> its value for the rows of that task. Raises
      ConfigError where the mixture does not fit the configuration. None: `default`, whatever the task.
  """

  needed: Callable[[Config], bool]
  default: Callable[[Config], int]
  from_task: Callable[[Config, int, int], int] | None = None


def _domain_of_task(config: Config, number: int, tasks: int) -> int:
  experts = config.model.moe.num_experts
  if tasks != experts:
    raise ConfigError(f"MoEConfig.router = 'domain' has an expert for each task of the mixture: {config.task.name!r} has "
                      f'{tasks}, MoEConfig.num_experts = {experts}.')
  return number


ROW_FEATURES: dict[str, RowFeature] = {
    'domain': RowFeature(needed=lambda config: config.model.moe.uses('domain'), default=lambda config: config.infer.domain,
                         from_task=_domain_of_task),
    # The slot of the row's delta, 0 for none. An engine that serves several deltas puts it into its batches; nothing else does.
    'delta': RowFeature(needed=lambda config: False, default=lambda config: 0),
}


def names(config: Config) -> tuple[str, ...]:
  """The features that the rows of a configuration carry."""
  return tuple(name for name, feature in ROW_FEATURES.items() if feature.needed(config))


def defaults(config: Config) -> dict[str, int]:
  """The value of each feature that the configuration needs, for rows of which nothing else is known."""
  return {name: ROW_FEATURES[name].default(config) for name in names(config)}


def of_task(config: Config, number: int, tasks: int, otherwise: Mapping[str, int] | None = None) -> dict[str, int]:
  """What the rows of one task of a mixture carry.

  Args:
    config: names the mixture.
    number: which task of it, from 0.
    tasks: how many tasks it has.
    otherwise: the values where the task does not decide, or the mixture does not fit the configuration.

  Raises:
    ConfigError: the mixture does not fit the configuration, and `otherwise` is not given.
  """
  row = defaults(config) if otherwise is None else dict(otherwise)
  for name in names(config):
    decide = ROW_FEATURES[name].from_task
    try:
      row[name] = row[name] if decide is None else decide(config, number, tasks)
    except ConfigError:
      if otherwise is None:
        raise
  return row
