"""The table of methods of tuning, and the model that carries a delta of some of them.

A method is one file: a function that makes a `Method` from a DeltaConfig, registered under a name.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping

import jax
import numpy as np

from t5x_cpm.config import Config, ConfigError, DeltaConfig, ModelConfig
from t5x_cpm.config.fields import did_you_mean
from t5x_cpm.models import encoder_decoder, hooks
from t5x_cpm.models.component import Weight
from t5x_cpm.models.hooks import Site
from t5x_cpm.models.model import Experts, resident
from t5x_cpm.models.products import dense


@dataclasses.dataclass(frozen=True, eq=False)
class Method:
  """One way to change what the sites of a frozen model give.

  Attributes:
    weights: what it declares for a site; {} for a site that it leaves alone. Shapes are without the axes of layers and slots.
    change: (weights, x, y) -> what the site gives in the place of y; see `hooks.Method`.
    prompt: what it declares for the vectors that stand for DeltaConfig.prompts tokens; None: it has none.
    merge: (weights of one layer, a matrix [I, O]) -> the matrix that gives what `change` makes of its product, float32 of
      numpy; None: there is no such matrix.
  """

  weights: Callable[[Site], Mapping[str, Weight]] = lambda site: {}
  change: Callable[[Mapping[str, jax.Array], jax.Array, jax.Array], jax.Array] = lambda weights, x, y: y
  prompt: Callable[[ModelConfig], Weight] | None = None
  merge: Callable[[Mapping[str, np.ndarray], np.ndarray], np.ndarray] | None = None


METHODS: dict[str, Callable[[DeltaConfig], Method]] = {}


def register(name: str, make: Callable[[DeltaConfig], Method]) -> None:
  """Adds a method under a name for DeltaConfig.method; a module with methods of your own is named by --import.

  Raises:
    ConfigError: the name is taken, or could not be joined with others.
  """
  if name in METHODS or not re.fullmatch(r'\w+', name):
    raise ConfigError(f'tuning method {name!r}: expected a name of letters, digits and _ that is not {", ".join(METHODS)}.')
  METHODS[name] = make


def product(x_BTI: jax.Array, kernel_nIO: jax.Array) -> jax.Array:
  """x times the matrix of each row, [B, T, O]; where n is 1 all rows have one."""
  if kernel_nIO.shape[0] == 1:
    return dense(x_BTI, kernel_nIO[0])
  return x_BTI @ kernel_nIO.astype(x_BTI.dtype)


def matches(pattern: str, name: str) -> bool:
  """Whether a name has the pattern in it, in whole parts, or is matched as a whole by it as a regular expression."""
  if f'.{pattern}.' in f'.{name}.':
    return True
  try:
    return re.fullmatch(pattern, name) is not None
  except re.error as error:
    raise ConfigError(f'DeltaConfig.sites: {pattern!r} is no regular expression ({error}).') from None


def chosen(patterns: tuple[str, ...], site: Site) -> bool:
  """Whether one of DeltaConfig.sites names a site."""
  return any(matches(pattern, site.full_name) for pattern in patterns)


class Delta:
  """The methods of a delta, as `encoder_decoder.build` takes them.

  Attributes:
    methods: by name, in the order in which they act.
    prompt: what stands for tokens from ModelConfig.vocab_size on; None where nothing does.
  """

  def __init__(self, config: DeltaConfig, model: ModelConfig):
    """Raises ConfigError for a method that nobody registered."""
    for name in config.methods:
      if name not in METHODS:
        raise ConfigError(f'DeltaConfig.method = {config.method!r}: there is no method {name!r}; expected one of '
                          f'{", ".join(METHODS)}, or several joined by +.{did_you_mean(name, METHODS)} A method of your own '
                          'module needs --import=MODULE.')
    self._made = {name: METHODS[name](config) for name in config.methods}
    self.methods: tuple[tuple[str, hooks.Method], ...] = tuple(self._made.items())
    prompts = [method.prompt(model) for method in self._made.values() if method.prompt]
    self.prompt = prompts[0] if prompts else None

  def weights(self, site: Site) -> dict[str, dict[str, Weight]]:
    """Method -> name -> what it declares for a site."""
    return {name: dict(declared) for name, method in self._made.items() if (declared := method.weights(site))}


def check_sites(config: DeltaConfig, known: list[Site]) -> None:
  """Raises ConfigError for a pattern of DeltaConfig.sites that names no site."""
  names = sorted({site.full_name for site in known if site.is_product})
  for pattern in config.sites:
    if not any(matches(pattern, name) for name in names):
      parts = {part for name in names for part in (*name.split('.'), name.partition('.')[2])}
      near = did_you_mean(pattern, [*names, *sorted(parts)])
      raise ConfigError(f'DeltaConfig.sites = {config.sites!r}: {pattern!r} names no place in the model.{near} There are '
                        f'{", ".join(names)}.')


def build_model(config: Config, experts: Experts = resident) -> encoder_decoder.Model:
  """The model of a run, with its delta if DeltaConfig.method names one: then its parameters have the subtree 'delta'.

  Args:
    config: the run's configuration.
    experts: as `encoder_decoder.build` takes them.

  Raises:
    ConfigError: a hyperparameter, router, method or site that cannot work.
  """
  if not config.delta.method:
    return encoder_decoder.build(config.model, experts)
  model = encoder_decoder.build(config.model, experts, Delta(config.delta, config.model))
  if 'lora' in config.delta.methods:
    check_sites(config.delta, model.sites())
  return model
