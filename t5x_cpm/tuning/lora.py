"""LoRA (Hu et al. 2021): y + (alpha / rank) x A B for chosen matrices, with A at random and B zero at first.

An expert has a pair (A, B) of its own.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from t5x_cpm.config import ConfigError, DeltaConfig
from t5x_cpm.models.component import Weight
from t5x_cpm.models.hooks import Product, Site
from t5x_cpm.tuning.methods import Method, chosen, product, register


def scale_of(config: DeltaConfig) -> float:
  """What the product of the two small matrices is multiplied by."""
  return config.alpha / (math.sqrt(config.rank) if config.rank_stabilised else config.rank)


def make(config: DeltaConfig) -> Method:
  """The method 'lora'. Raises ConfigError when a rank exceeds a matrix that `sites` names."""
  scale = scale_of(config)

  def weights(site: Site) -> dict[str, Weight]:
    if not (site.is_product or site.experts) or not chosen(config.sites, site):
      return {}
    (rows, columns), (reads, gives) = site.sizes, site.axes
    if config.rank > min(rows, columns):
      raise ConfigError(f'DeltaConfig.rank = {config.rank}: {site.full_name} is a matrix of {rows} x {columns}; expected a '
                        f'rank of at most {min(rows, columns)}.')
    bound = rows**-0.5

    def uniform(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
      return jax.random.uniform(key, shape, minval=-bound, maxval=bound)

    return {'a': Weight((rows, config.rank), (reads, None), uniform),
            'b': Weight((config.rank, columns), (None, gives), lambda key, shape: jnp.zeros(shape))}

  def change(weights: Mapping[str, jax.Array], x: jax.Array, y: jax.Array) -> jax.Array:
    return y + product(product(x, weights['a']), weights['b']) * scale

  def change_experts(weights: Mapping[str, jax.Array], x: jax.Array, y: jax.Array, product: Product) -> jax.Array:
    return y + product(product(x, weights['a']), weights['b']) * scale

  def folded(weights: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
    return {'a': weights['a'], 'b': weights['b'] * np.float32(scale)}

  def merge(weights: Mapping[str, np.ndarray], kernel: np.ndarray) -> np.ndarray:
    return kernel + weights['a'] @ weights['b'] * np.float32(scale)

  return Method(weights, change, config.lora_dropout, change_experts, folded=folded, merge=merge,
                alike={'rank': 1, 'alpha': 1.0, 'sites': config.sites})


def joined_fields(configs: Sequence[DeltaConfig]) -> dict[str, Any]:
  """The fields of a LoRA whose product is a weighted sum of the products of others: their ranks together, and the scale 1."""
  rank = sum(config.rank for config in configs)
  return {'rank': rank, 'alpha': float(rank), 'rank_stabilised': False}


def joined(name: str, values: Sequence[np.ndarray], shares: Sequence[float], configs: Sequence[DeltaConfig]) -> np.ndarray:
  """The 'a' [L, I, r] or the 'b' [L, r, O] of that LoRA, from those of the others; `b` carries the shares and the scales."""
  if name == 'a':
    return np.concatenate(values, axis=-1)
  return np.concatenate([value * np.float32(share * scale_of(config))
                         for value, share, config in zip(values, shares, configs)], axis=-2)


register('lora', make)
