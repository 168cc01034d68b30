"""The table of methods of tuning, and the model that carries a delta of some of them.

A method is one file: a function that makes a `Method` from a DeltaConfig, registered under a name.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from t5x_cpm.config import Config, ConfigError, DeltaConfig, ModelConfig
from t5x_cpm.config.fields import did_you_mean, shown
from t5x_cpm.models import encoder_decoder, hooks
from t5x_cpm.models.component import Weight
from t5x_cpm.models.hooks import Site
from t5x_cpm.models.leaf import Leaf
from t5x_cpm.models.model import Experts, resident
from t5x_cpm.models.products import dense


@dataclasses.dataclass(frozen=True, eq=False)
class Method:
  """One way to change what the sites of a frozen model give.

  Attributes:
    weights: what it declares for a site; {} for a site that it leaves alone. Shapes are without the axes of layers and slots.
    change: (weights, x, y) -> what the site gives in the place of y; see `hooks.Method`.
    dropout_rate: of what `change` reads as x, in training.
    change_experts: the same in the matrices of experts; None: it leaves them alone.
    prefix: weights -> the vectors that stand before what the site gives, or None; see `hooks.Method`.
    prompt: what it declares for the vectors that stand for DeltaConfig.prompts tokens; None: it has none.
    alike: fields of DeltaConfig, others have their defaults, with which `change` is made for a batch of rows with different
      deltas, whose axes without a name are then filled up with zeros. Deltas for which it is the same share a batch. None:
      those share one that have the same configuration.
    folded: what the weights of a site become for that `change`.
    merge: (weights of one layer, a matrix [I, O], or [E, I, O] of experts) -> the matrix that gives what `change` makes of its
      product, float32 of numpy; None: there is no such matrix.
  """

  weights: Callable[[Site], Mapping[str, Weight]] = lambda site: {}
  change: Callable[[Mapping[str, jax.Array], jax.Array, jax.Array], jax.Array] = lambda weights, x, y: y
  dropout_rate: float = 0.0
  change_experts: hooks.ChangeExperts | None = None
  prefix: Callable[[Mapping[str, jax.Array]], jax.Array | None] = lambda weights: None
  prompt: Callable[[ModelConfig], Weight] | None = None
  alike: Mapping[str, Any] | None = None
  folded: Callable[[Mapping[str, np.ndarray]], Mapping[str, np.ndarray]] = lambda weights: weights
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


def matches(pattern: str, name: str, field: str = 'sites') -> bool:
  """Whether a name has the pattern in it, in whole parts, or is matched as a whole by it as a regular expression."""
  if f'.{pattern}.' in f'.{name}.':
    return True
  try:
    return re.fullmatch(pattern, name) is not None
  except re.error as error:
    raise ConfigError(f'DeltaConfig.{field}: {pattern!r} is no regular expression ({error}).') from None


def chosen(patterns: tuple[str, ...], site: Site) -> bool:
  """Whether one of DeltaConfig.sites names a site. One of experts, which are many, must be named as such."""
  return any(matches(pattern, site.full_name) for pattern in patterns if not site.experts or 'experts' in pattern)


class Delta:
  """The methods of a delta, as `encoder_decoder.build` takes them.

  Attributes:
    methods: by name, in the order in which they act.
    prompt: what stands for tokens from ModelConfig.vocab_size on; None where nothing does.
    sight: in the encoder, whether its vectors attend to other tokens, and other tokens to them.
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
    self.token_ids, self._whole = config.token_ids, config.modules_to_save
    if any(number >= model.vocab_size for number in config.token_ids):
      raise ConfigError(f'DeltaConfig.token_ids = {shown(config.token_ids)}: expected ids below ModelConfig.vocab_size = '
                        f'{model.vocab_size}.')
    self.sight = config.prompt_sees_text, config.text_sees_prompt

  def whole(self, leaf: Leaf) -> bool:
    """Whether one of DeltaConfig.modules_to_save names a parameter of the model."""
    return leaf.has_gradient and any(
        matches(pattern, leaf.name.replace('/', '.'), 'modules_to_save') for pattern in self._whole)

  def weights(self, site: Site) -> dict[str, dict[str, Weight]]:
    """Method -> name -> what it declares for a site."""
    return {name: dict(declared) for name, method in self._made.items()
            if (method.change_experts or not site.experts) and (declared := method.weights(site))}


def check_sites(config: DeltaConfig, known: list[Site]) -> None:
  """Raises ConfigError for a pattern of DeltaConfig.sites that names no site."""
  products = [site for site in known if site.is_product or site.experts]
  names = sorted({site.full_name for site in products})
  for pattern in config.sites:
    if not any(chosen((pattern,), site) for site in products):
      parts = {part for name in names for part in (*name.split('.'), name.partition('.')[2])}
      near = did_you_mean(pattern, [*names, *sorted(parts)])
      raise ConfigError(f'DeltaConfig.sites = {config.sites!r}: {pattern!r} names no place in the model.{near} There are '
                        f'{", ".join(names)}.')


def check_modules(config: DeltaConfig, delta: Delta, model: encoder_decoder.Model) -> None:
  """Raises ConfigError for one of DeltaConfig.modules_to_save that names nothing, and where it trains all rows of tokens."""
  trained = [leaf for leaf in jax.tree.leaves(model.leaves()) if leaf.has_gradient and not leaf.name.startswith('delta/')]
  names = [leaf.name.replace('/', '.') for leaf in trained]
  for pattern in config.modules_to_save:
    if not any(matches(pattern, name, 'modules_to_save') for name in names):
      near = did_you_mean(pattern, sorted({*names, *(part for name in names for part in name.split('.'))}))
      raise ConfigError(f'DeltaConfig.modules_to_save = {shown(config.modules_to_save)}: {pattern!r} names no parameter of the '
                        f'model that is trained.{near} There are {", ".join(names)}.')
  if config.token_ids and all(delta.whole(leaf) for leaf in trained if 'vocab' in leaf.axes):
    raise ConfigError('DeltaConfig.modules_to_save trains all rows of the embedding and of the output, DeltaConfig.token_ids '
                      'some of them: leave one of the two out.')


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
  delta = Delta(config.delta, config.model)
  model = encoder_decoder.build(config.model, experts, delta)
  if 'lora' in config.delta.methods:
    check_sites(config.delta, model.sites())
  check_modules(config.delta, delta, model)
  return model


@functools.lru_cache(maxsize=8)
def leaves(model: ModelConfig, delta: DeltaConfig) -> Any:
  """The description of a delta's parameters on a model, Model.leaves()['delta']. Raises as `build_model`."""
  return build_model(Config(model=model, delta=delta)).leaves()['delta']  # remembered: hundreds of deltas may be alike
