"""The program of a bundle: a model whose experts come when they are needed."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from t5x_cpm.checkpoints.run_directory import CheckpointError
from t5x_cpm.config import Config
from t5x_cpm.inference import decode
from t5x_cpm.inference.programs import Batch, Functions, Measure, Params
from t5x_cpm.infmoe import plan
from t5x_cpm.infmoe.run import Run
from t5x_cpm.infmoe.stages import Stages
from t5x_cpm.models import attention

_take = jax.jit(attention.take)
_reorder = jax.jit(attention.reorder, donate_argnums=0)


@functools.partial(jax.jit, static_argnums=0)
def _measured(measure: Measure, logits_BTV: jax.Array, batch: Batch) -> Any:
  return measure(logits_BTV, batch)


class Streamed:
  """See `programs.Program`.

  Attributes:
    run: the model.
  """

  def __init__(self, run: Run, stages: dict[Any, Stages] | None = None):
    """stages: by model, those of models with a delta, which are compiled once."""
    self.run, self._stages = run, {} if stages is None else stages

  def whole(self, rows: int) -> int:
    return rows

  def start(self, batch: Batch, max_len: int) -> decode.Cache:
    return self.run.start(batch, max_len)

  def step(self, cache: decode.Cache, tokens_BT: jax.Array, positions_BT: jax.Array) -> tuple[jax.Array, decode.Cache]:
    return self.run.step(cache, tokens_BT, positions_BT)

  def take(self, cache: decode.Cache, rows_N: jax.Array) -> decode.Cache:
    return _take(cache, rows_N)

  def reorder(self, cache: decode.Cache, rows_N: jax.Array) -> decode.Cache:
    return _reorder(cache, rows_N)

  def generate(self, rule: decode.Rule, batch: Batch, prefix_BP: Any, stop_BE: Any, *, allowed: Any = None, seed: Any = 0,
               rows_B: Any = None) -> decode.Output:
    cache = self.start(batch, prefix_BP.shape[1] + rule.max_new_tokens - 1)
    *_, state = decode.python_loop(
        self.step, cache, rule, jnp.asarray(prefix_BP), jnp.asarray(stop_BE), take=self.take, reorder=self.reorder, seed=seed,
        rows_B=None if rows_B is None else jnp.asarray(rows_B), allowed=None if allowed is None else jnp.asarray(allowed))
    return rule.result(state)

  def score(self, measure: Measure, batch: Batch) -> Any:
    return _measured(measure, self.run.logits(batch), batch)

  def encode(self, batch: Batch) -> jax.Array:
    return self.run.encode(batch)

  def read(self, model_dir: Any, step: int) -> None:
    raise CheckpointError(f'{model_dir} is a bundle, which has one step alone.')

  def with_delta(self, functions: Functions, delta: Params) -> 'Streamed':
    model = functions.model
    if model not in self._stages:
      self._stages[model] = self.run.stages.of(model)
    return Streamed(self.run.with_delta(self._stages[model], delta), self._stages)

  def told(self) -> str:
    return self.run.store.told()

  def compared(self, config: Config) -> str:
    """How fast it was, beside what was planned, in a line."""
    return plan.compared(config, self.run.pace)

  def close(self) -> None:
    self.run.store.close()
