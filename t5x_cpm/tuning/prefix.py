"""Prefix tuning (Li and Liang 2021), P-tuning v2 (Liu et al. 2022): trained keys and values before those of each attention.

Every query sees them, at no position and without a bias. They are trained themselves, or as the outputs of a small network for
each attention, tanh(table) projection, which files of the delta hold as it was trained.
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from t5x_cpm.config import DeltaConfig
from t5x_cpm.models.component import Weight
from t5x_cpm.models.hooks import Site
from t5x_cpm.tuning.methods import Method, register

STD = 0.02  # of keys and values at first


def _normal(std: float) -> Callable[[jax.Array, tuple[int, ...]], jax.Array]:
  return lambda key, shape: std * jax.random.normal(key, shape)


def make(config: DeltaConfig) -> Method:
  """The method 'prefix'."""
  hidden = config.prefix_hidden

  def weights(site: Site) -> dict[str, Weight]:
    place, _, name = site.full_name.rpartition('.')
    if place not in config.prefix_places or name not in ('key', 'value'):
      return {}
    P, columns, axis = config.prefix_length, site.sizes[1], site.axes[1]
    if not hidden:
      return {'vectors': Weight((P, columns), (None, axis), _normal(STD))}
    return {'table': Weight((P, hidden), (None, None), _normal(1.0)),
            'projection': Weight((hidden, columns), (None, axis), _normal(STD * hidden**-0.5))}

  def prefix(weights: Mapping[str, jax.Array]) -> jax.Array:
    if not hidden:
      return weights['vectors']
    return jnp.tanh(weights['table']) @ weights['projection']

  def folded(weights: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
    return {'vectors': np.tanh(weights['table']) @ weights['projection']} if hidden else weights

  return Method(weights, prefix=prefix, alike={'prefix_length': 1, 'prefix_places': config.prefix_places}, folded=folded)


register('prefix', make)
