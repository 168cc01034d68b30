"""Adapters (Houlsby et al. 2019): a narrow network beside or behind each sublayer, whose output is zero at first.

Serial: y + gelu(y A) B, from what the sublayer gives. Parallel (He et al. 2022): y + gelu(x A) B, from what it reads.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from t5x_cpm.config import DeltaConfig
from t5x_cpm.models.component import Weight
from t5x_cpm.models.hooks import SUBLAYERS, Site
from t5x_cpm.tuning.methods import Method, product, register

STD = 0.01  # of the first matrix (Houlsby et al. 2019)


def make(config: DeltaConfig) -> Method:
  """The method 'adapter'."""

  def normal(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return STD * jax.random.normal(key, shape)

  def weights(site: Site) -> dict[str, Weight]:
    if site.name not in SUBLAYERS.values():
      return {}
    (reads, gives), (reads_axis, gives_axis) = site.sizes, site.axes
    return {'down': Weight((reads, config.bottleneck), (reads_axis, None), normal),
            'up': Weight((config.bottleneck, gives), (None, gives_axis), lambda key, shape: jnp.zeros(shape))}

  def change(weights: Mapping[str, jax.Array], x: jax.Array, y: jax.Array) -> jax.Array:
    narrow = jax.nn.gelu(product(y if config.adapter == 'serial' else x, weights['down']), approximate=False)
    return y + product(narrow, weights['up'])

  return Method(weights, change, alike={'bottleneck': 1, 'adapter': config.adapter})


register('adapter', make)
