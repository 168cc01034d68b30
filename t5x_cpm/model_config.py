"""The hyperparameters of a model, and what every configuration class is written with.

Nothing here imports JAX. `config` has the rest of a run's configuration, and all names of this file too.
"""

import dataclasses
from typing import Any


class ConfigError(ValueError):
  """A configuration value that cannot work. The message says what was given, what is expected and what to set."""


def free(default: Any) -> Any:
  """Declares a field that may differ when a run is resumed."""
  return dataclasses.field(default=default, metadata={'free': True})


def choice(owner: object, field: str, allowed: tuple[str, ...]) -> None:
  """Raises ConfigError unless the field holds one of the allowed names."""
  value = getattr(owner, field)
  if value not in allowed:
    raise ConfigError(f'{type(owner).__name__}.{field} = {value!r}: expected one of {", ".join(map(repr, allowed))}.')


def in_range(owner: object, field: str, low: float, high: float = float('inf')) -> None:
  """Raises ConfigError unless low <= value <= high."""
  value = getattr(owner, field)
  if not low <= value <= high:
    expected = f'at least {low}' if high == float('inf') else f'between {low} and {high}'
    raise ConfigError(f'{type(owner).__name__}.{field} = {value!r}: expected a number {expected}.')


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
  """Hyperparameters of an encoder-decoder Transformer (CPM-2, T5 1.1, mT5; Raffel et al. 2020, Zhang et al. 2021).

  The defaults are CPM-2's choices: RMSNorm before every sub-layer, gated tanh-GELU, untied output head, unscaled
  attention scores and logits, one relative position table per stack and no bias vector anywhere.
  """

  vocab_size: int = 26_240
  d_model: int = 128
  d_ff: int = 320
  num_heads: int = 4
  head_dim: int = 32
  num_encoder_layers: int = 2
  num_decoder_layers: int = 2
  mlp_activation: str = 'gated_gelu'  # 'gated_gelu', 'gated_silu', 'relu' or 'gelu'
  tie_embeddings: bool = False  # True: the head is the embedding table and the decoder output is divided by sqrt(d_model)
  num_buckets: int = 32
  max_distance: int = 128
  norm_epsilon: float = 1e-6
  dropout_rate: float = 0.0
  initializer: str = 'cpm2'  # 'cpm2': normal with init_std, output projections with init_std / sqrt(2 L); 't5': by fan-in
  init_std: float = 0.001  # read by the 'cpm2' initializer only
  dtype: str = free('auto')  # of the computation: 'auto' is bfloat16 on accelerators and float32 on CPU
  param_dtype: str = 'float32'
  remat: str = free('none')  # what the backward pass recomputes: 'none', 'dots' (all but matrix products) or 'full'
  layer_loop: str = free('auto')  # 'scan', 'unroll', or 'auto': unrolled on CPU, where it is faster, scanned elsewhere

  def validate(self) -> None:
    for field in ('vocab_size', 'd_model', 'd_ff', 'num_heads', 'head_dim', 'num_encoder_layers', 'num_decoder_layers'):
      in_range(self, field, 1)
    in_range(self, 'num_buckets', 4)
    if self.num_buckets % 4:
      raise ConfigError(
          f'ModelConfig.num_buckets = {self.num_buckets}: expected a multiple of 4, because the encoder splits the '
          'buckets by direction and each half again into exact and logarithmic distances.')
    if self.max_distance <= self.num_buckets // 2:
      raise ConfigError(
          f'ModelConfig.max_distance = {self.max_distance}: expected more than num_buckets / 2 = {self.num_buckets // 2}, '
          'the distances that have a bucket each.')
    in_range(self, 'norm_epsilon', 0.0)
    in_range(self, 'dropout_rate', 0.0, 0.99)
    in_range(self, 'init_std', 0.0)
    choice(self, 'mlp_activation', ('gated_gelu', 'gated_silu', 'relu', 'gelu'))
    choice(self, 'initializer', ('cpm2', 't5'))
    choice(self, 'dtype', ('auto', 'float32', 'bfloat16', 'float64'))
    choice(self, 'param_dtype', ('float32', 'bfloat16', 'float64'))
    choice(self, 'remat', ('none', 'dots', 'full'))
    choice(self, 'layer_loop', ('auto', 'scan', 'unroll'))
