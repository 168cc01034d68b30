"""What every stack is built from: norm, embedding, gated feed-forward network, relative position bias, dropout.

A module states the shape, the logical axes and the initial value of its weights in its constructor. Modules are rebuilt from
plain trees inside the model, so none of them keeps a random state or an array between calls.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from t5x_cpm import backend
from t5x_cpm.config import ModelConfig
from t5x_cpm.models.products import dense

ACTIVATIONS: dict[str, tuple[Callable[[jax.Array], jax.Array], bool]] = {  # name -> (function, gated)
    'gated_gelu': (lambda x: jax.nn.gelu(x, approximate=True), True),
    'gated_silu': (jax.nn.silu, True),
    'relu': (jax.nn.relu, False),
    'gelu': (lambda x: jax.nn.gelu(x, approximate=True), False),
}


def compute_dtype(config: ModelConfig) -> jnp.dtype:
  """The dtype of activations and products. 'auto': bfloat16 where there is hardware for it."""
  if config.dtype == 'auto':
    return jnp.dtype('float32' if backend.on_cpu() else 'bfloat16')
  return jnp.dtype(config.dtype)


def at_least_float32(dtype: Any) -> jnp.dtype:
  """The dtype of softmax, norms, logits and loss. float64 stays, so that tests can run in it."""
  return jnp.promote_types(dtype, jnp.float32)


def normal(rngs: nnx.Rngs, shape: tuple[int, ...], std: float, names: tuple[str | None, ...], config: ModelConfig,
           decays: bool = True) -> nnx.Param:
  """A parameter drawn from N(0, std) with these logical axis names; `decays` says whether weight decay applies to it."""
  value = std * jax.random.normal(rngs.params(), shape, jnp.dtype(config.param_dtype))
  return nnx.Param(value, axes=names, decays=decays)


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
  """Zeroes a fraction `rate` of x and scales the rest. Without a key (outside training) x is returned."""
  if key is None or rate == 0.0:
    return x
  keep = jax.random.bernoulli(key, 1.0 - rate, x.shape)
  return jnp.where(keep, x / (1.0 - rate), jnp.zeros_like(x))


def scramble(x: jax.Array) -> jax.Array:
  """Maps each uint32 to a fixed number that looks random (the finaliser of MurmurHash3, by Austin Appleby)."""
  x = x + jnp.uint32(0x9e3779b9)
  for shift, factor in ((16, 0x85ebca6b), (13, 0xc2b2ae35)):
    x = (x ^ (x >> shift)) * jnp.uint32(factor)
  return x ^ (x >> 16)


class RMSNorm(nnx.Module):
  """x / rms(x) * scale, without mean subtraction or bias (Zhang and Sennrich 2019)."""

  def __init__(self, config: ModelConfig):
    self.epsilon = config.norm_epsilon
    self.scale = nnx.Param(jnp.ones(config.d_model, jnp.dtype(config.param_dtype)), axes=('embed',), decays=False)

  def __call__(self, x: jax.Array) -> jax.Array:
    wide = x.astype(at_least_float32(x.dtype))
    inverse_rms = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.epsilon)
    return (wide * inverse_rms).astype(x.dtype) * jnp.asarray(self.scale[...], x.dtype)


class Embedding(nnx.Module):
  """The input table, shared by encoder and decoder. Not scaled."""

  def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
    std = config.init_std if config.initializer == 'cpm2' else 1.0
    self.embedding = normal(rngs, (config.vocab_size, config.d_model), std, ('vocab', 'embed'), config)

  def __call__(self, tokens_BT: jax.Array, dtype: jnp.dtype) -> jax.Array:
    return jnp.take(self.embedding[...], tokens_BT, axis=0).astype(dtype)


class Head(nnx.Module):
  """The matrix [D, V] from the decoder's output to logits, where it is not the input table."""

  def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
    std = config.init_std if config.initializer == 'cpm2' else config.d_model**-0.5
    self.lm_head = normal(rngs, (config.d_model, config.vocab_size), std, ('embed', 'vocab'), config)


MLP_AXES = {'wi_0': ('embed', 'mlp'), 'wi_1': ('embed', 'mlp'), 'wo': ('mlp', 'embed')}


def by_name(name: str, x: jax.Array, kernel: Any) -> jax.Array:
  """The product with a kernel, whatever its name."""
  del name
  return dense(x, kernel)


class MLP(nnx.Module):
  """wo(act(wi_0 x) * wi_1 x), or wo(act(wi_0 x)) for an activation that is not gated; no bias vectors."""

  def __init__(self, config: ModelConfig, num_layers: int, rngs: nnx.Rngs, width: int = 1):
    """width: multiplies d_ff."""
    self.activation = config.mlp_activation
    d, f = config.d_model, config.d_ff * width
    std_in, std_out = d**-0.5, f**-0.5
    if config.initializer == 'cpm2':
      std_in, std_out = config.init_std, config.init_std / math.sqrt(2 * num_layers)
    self.wi_0 = normal(rngs, (d, f), std_in, MLP_AXES['wi_0'], config)
    if ACTIVATIONS[config.mlp_activation][1]:
      self.wi_1 = normal(rngs, (d, f), std_in, MLP_AXES['wi_1'], config)
    self.wo = normal(rngs, (f, d), std_out, MLP_AXES['wo'], config)

  def __call__(self, x: jax.Array, drop: Callable[[jax.Array], jax.Array] = lambda hidden: hidden,
               product: Callable[[str, jax.Array, jax.Array], jax.Array] = by_name) -> jax.Array:
    """Applies the network to x [..., D].

    Args:
      x: the input.
      drop: dropout of the hidden activations.
      product: (name of the kernel, rows, kernel) -> rows; it replaces the matrix product when weights carry an expert axis,
        or a delta changes it.
    """
    activation, gated = ACTIVATIONS[self.activation]
    hidden = activation(product('wi_0', x, self.wi_0[...]))
    if gated:
      hidden = hidden * product('wi_1', x, self.wi_1[...])
    return product('wo', drop(hidden), self.wo[...])


def relative_position_bucket(distance: Any, *, bidirectional: bool, num_buckets: int, max_distance: int) -> Any:
  """The bucket of key position minus query position (T5, Raffel et al. 2020, section 2.1; T5's own rounding).

  Half of the buckets (of each direction, when bidirectional) are exact distances, the rest grow logarithmically up to
  max_distance. Works on numpy and JAX integers of any shape.
  """
  xp = np if isinstance(distance, np.ndarray) else jnp
  bucket = xp.zeros_like(distance)
  if bidirectional:
    num_buckets //= 2
    bucket = xp.where(distance > 0, num_buckets, 0)
    distance = xp.abs(distance)
  else:
    distance = xp.maximum(-distance, 0)
  exact = num_buckets // 2
  # float32, as in T5: a wider type rounds a few distances into another bucket.
  ratio = xp.log(xp.maximum(distance, 1).astype(xp.float32) / np.float32(exact)) / np.float32(math.log(max_distance / exact))
  far = exact + (ratio * np.float32(num_buckets - exact)).astype(xp.int32)
  far = xp.minimum(far, num_buckets - 1)
  return bucket + xp.where(distance < exact, distance, far)


class RelativeBias(nnx.Module):
  """One table [buckets, H] per stack, added to the attention scores of each of its layers."""

  def __init__(self, config: ModelConfig, bidirectional: bool, rngs: nnx.Rngs):
    self.bidirectional = bidirectional
    self.num_buckets, self.max_distance = config.num_buckets, config.max_distance
    std = 1.0 if config.initializer == 'cpm2' else config.d_model**-0.5
    self.table = normal(rngs, (config.num_buckets, config.num_heads), std, ('buckets', None), config, decays=False)

  def _of_distance(self, distance: Any) -> jax.Array:
    return relative_position_bucket(
        distance, bidirectional=self.bidirectional, num_buckets=self.num_buckets, max_distance=self.max_distance)

  def sequence(self, T: int, S: int, dtype: jnp.dtype) -> jax.Array:
    """The bias [H, T, S] of queries 0..T-1 on keys 0..S-1."""
    # Row i holds the values of the distances -i .. S-1-i: the row before it, moved by one. The skew below writes that with
    # reshapes, whose gradient is a sum; the gradient of a gather would be a scatter over T * S entries.
    bucket = self._of_distance(np.arange(1 - T, S))
    by_distance_WH = jax.nn.one_hot(bucket, self.num_buckets, dtype=self.table[...].dtype) @ self.table[...]
    W, H = by_distance_WH.shape
    rows = jnp.broadcast_to(by_distance_WH.T[:, None, :], (H, T, W)).reshape(H, T * W)
    skewed = rows[:, T - 1:T - 1 + T * (W - 1)].reshape(H, T, W - 1) if W > 1 else rows.reshape(H, 1, 1)
    return skewed[:, :, :S].astype(dtype)

  def at(self, positions_BT: jax.Array, S: int, dtype: jnp.dtype) -> jax.Array:
    """The bias [B, H, T, S] of queries at the given positions on keys 0..S-1, for decoding."""
    bucket = self._of_distance(jnp.arange(S) - positions_BT[:, :, None])
    return jnp.moveaxis(jnp.take(self.table[...], bucket, axis=0), -1, 1).astype(dtype)
