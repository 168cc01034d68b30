"""BitFit (Ben Zaken et al. 2022): biases alone are trained. These models have none, so each product gets one, zero at first."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from t5x_cpm.config import DeltaConfig
from t5x_cpm.models.component import Weight
from t5x_cpm.models.hooks import Site
from t5x_cpm.tuning.methods import Method, register


def make(config: DeltaConfig) -> Method:
  """The method 'bitfit'."""
  del config

  def weights(site: Site) -> dict[str, Weight]:
    if not site.is_product:
      return {}
    return {'bias': Weight(site.sizes[1:], site.axes[1:], lambda key, shape: jnp.zeros(shape))}

  def change(weights: Mapping[str, jax.Array], x: jax.Array, y: jax.Array) -> jax.Array:
    del x
    return y + weights['bias'][:, None].astype(y.dtype)

  return Method(weights, change, alike={})


register('bitfit', make)
