"""IA3 (Liu et al. 2022): a vector each, ones at first, scales keys, values and the activations of the feed-forward part."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from t5x_cpm.config import DeltaConfig
from t5x_cpm.models.component import Weight
from t5x_cpm.models.hooks import Site
from t5x_cpm.tuning.methods import Method, register

SITES = ('self.key', 'self.value', 'cross.key', 'cross.value', 'mlp.hidden')


def make(config: DeltaConfig) -> Method:
  """The method 'ia3'."""
  del config

  def weights(site: Site) -> dict[str, Weight]:
    if site.name not in SITES:
      return {}
    return {'scale': Weight(site.sizes[1:], site.axes[1:], lambda key, shape: jnp.ones(shape))}

  def change(weights: Mapping[str, jax.Array], x: jax.Array, y: jax.Array) -> jax.Array:
    del x
    return y * weights['scale'][:, None].astype(y.dtype)

  def merge(weights: Mapping[str, np.ndarray], kernel: np.ndarray) -> np.ndarray:
    return kernel * weights['scale']

  return Method(weights, change, alike={}, merge=merge)


register('ia3', make)
