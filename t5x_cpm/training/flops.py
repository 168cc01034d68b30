"""How much arithmetic a training step needs, and how much a device can do: model FLOP/s and MFU."""

import time
from typing import Any

import jax
import jax.numpy as jnp

from t5x_cpm import chips
from t5x_cpm.config import ModelConfig
from t5x_cpm.models import routers


def _of_a_token(config: ModelConfig, S: int, T: int) -> tuple[float, float, float]:
  """Forward FLOPs of an encoder token in the encoder, of its keys and values in cross-attention, and of a decoder token."""
  D, F, HK = config.d_model, config.d_ff, config.num_heads * config.head_dim
  mlp = 2 * (3 if config.mlp_activation.startswith('gated') else 2) * D * F

  def feed_forward(stack: str) -> float:
    layers, every = config.num_layers(stack), config.moe.every(stack)
    if not every:
      return layers * mlp
    networks = routers.experts_of_token(config.moe, stack) + config.moe.shared_experts
    routed = layers // every
    return (layers - routed) * mlp + routed * (networks * mlp + 2 * D * config.moe.num_experts)

  encoder = config.num_encoder_layers * (8 * D * HK + 4 * S * HK) + feed_forward('encoder')
  decoder = config.num_decoder_layers * (12 * D * HK + 4 * (S + T) * HK) + feed_forward('decoder') + 2 * D * config.vocab_size
  return encoder, config.num_decoder_layers * 4 * D * HK, decoder


def model_flops(config: ModelConfig, encoder_tokens: float, decoder_tokens: float, S: int, T: int, *,
                frozen: bool = False) -> float:
  """Floating-point operations that one training step has to do, forward and backward.

  A product of [N, I] and [I, O] counts 2 N I O. With HK = num_heads * head_dim, m = 3 matrices in a gated MLP and 2
  otherwise, the forward pass costs

    per encoder token, L_e times:  8 D HK (q, k, v, output) + 2 m D F + 4 S HK (scores and weighted sum over S keys)
    per encoder token, L_d times:  4 D HK (keys and values of cross-attention)
    per decoder token, L_d times:  8 D HK + 4 D HK (q and output of cross-attention) + 2 m D F + 4 T HK + 4 S HK
    per decoder token:             2 D V (output head)

  and the backward pass twice that: half for gradients of activations, half for those of weights, which a frozen base does not
  need. What a delta adds is small and left out. In a layer with experts a token pays for the experts it is sent to, for shared
  experts, and 2 D E for the router. Embedding look-ups, norms and activations are left out, and so is what rematerialisation
  computes again; causal attention is not discounted (as in Chowdhery et al. 2022, appendix B).

  Args:
    config: shape of the model.
    encoder_tokens: tokens that are not padding, in the whole batch.
    decoder_tokens: likewise.
    S: slots of an encoder row.
    T: slots of a decoder row.
    frozen: whether the weights are a frozen base, on which a delta is trained.
  """
  encoder, keys, decoder = _of_a_token(config, S, T)
  return (2.0 if frozen else 3.0) * (encoder_tokens * (encoder + keys) + decoder_tokens * decoder)


def forward_flops(config: ModelConfig, encoder_tokens: float, decoder_tokens: float, S: int, T: int) -> float:
  """As `model_flops`, of the forward pass alone, which is all that a teacher does."""
  encoder, keys, decoder = _of_a_token(config, S, T)
  return encoder_tokens * (encoder + keys) + decoder_tokens * decoder


def inference_flops(config: ModelConfig, step: str, rows: int, S: int, T: int) -> float:
  """Floating-point operations that one call of a part of inference has to do.

  Args:
    config: shape of the model.
    step: 'encode', rows of S tokens through the encoder alone; or 'decode', a token of each row through the decoder, whose
      cache has S and T slots and the keys and values of the encoder's output.
    rows: rows in the batch.
    S: slots of an encoder row.
    T: slots of a decoder row.
  """
  encoder, _, decoder = _of_a_token(config, S, T)
  return rows * S * encoder if step == 'encode' else rows * decoder


def measure_gemm_flops() -> float:
  """FLOP/s of a float32 product of two square matrices on the default device, best of 5; about 0.3 s on 2 cores."""
  size = 1024
  x = jnp.ones((size, size), jnp.float32)
  product = jax.jit(lambda x: x @ x).lower(x).compile()
  product(x).block_until_ready()
  best = float('inf')
  for _ in range(5):
    start = time.perf_counter()
    product(x).block_until_ready()
    best = min(best, time.perf_counter() - start)
  return 2.0 * size**3 / best


def peak_flops(device: Any, configured: float = 0.0) -> float | None:
  """FLOP/s that MFU compares one device with.

  Args:
    device: looked up by its kind; on CPU the rate of a float32 product is measured.
    configured: MetricsConfig.peak_flops, which counts when it is not 0.

  Returns:
    None for a kind that is not in the table.
  """
  if configured:
    return configured
  if device.platform == 'cpu':
    # XLA:CPU runs all products on one pool of threads: fake devices share it.
    return measure_gemm_flops() / max(jax.local_device_count(), 1)
  chip = chips.of_device_kind(device.device_kind)
  return chip.flops if chip else None
