"""LoRA (Hu et al. 2021): y + (alpha / rank) x A B for chosen matrices, with A at random and B zero at first.

An expert has a pair (A, B) of its own.
"""

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from t5x_cpm.config import ConfigError, DeltaConfig
from t5x_cpm.models.component import Weight
from t5x_cpm.models.hooks import Product, Site
from t5x_cpm.tuning.methods import Method, chosen, product, register


def make(config: DeltaConfig) -> Method:
  """The method 'lora'. Raises ConfigError when a rank exceeds a matrix that `sites` names."""
  scale = config.alpha / (math.sqrt(config.rank) if config.rank_stabilised else config.rank)

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

  return Method(weights, change, change_experts, alike={'rank': 1, 'alpha': 1.0, 'sites': config.sites}, folded=folded)


register('lora', make)
