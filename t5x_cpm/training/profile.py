"""A window of steps, recorded by the JAX profiler."""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax

from t5x_cpm.checkpoints.run_directory import resolve
from t5x_cpm.config import MetricsConfig


class Profile:
  """Records MetricsConfig.profile_steps steps into model_dir/profile, for TensorBoard or Perfetto."""

  def __init__(self, model_dir: Any, config: MetricsConfig):
    self._folder = str(resolve(model_dir) / 'profile')
    self._first, self._steps = config.profile_start, config.profile_steps
    self._running = False

  @contextlib.contextmanager
  def step(self, step: int) -> Iterator[None]:
    """A context around the dispatch of the step after `step` updates."""
    if step == self._first:
      jax.profiler.start_trace(self._folder)
      self._running = True
    elif self._running and step > self._first + self._steps:
      # One step late: only now is it certain that the window's last step, dispatched ahead, has run.
      self.close()
    with jax.profiler.StepTraceAnnotation('train', step_num=step) if self._running else contextlib.nullcontext():
      yield

  def close(self) -> None:
    """Writes the trace, if one is being recorded."""
    if self._running:
      self._running = False
      jax.profiler.stop_trace()

  def __enter__(self) -> 'Profile':
    return self

  def __exit__(self, *exception: Any) -> None:
    self.close()
