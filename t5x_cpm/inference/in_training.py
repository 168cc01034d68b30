"""Metrics of a task's answers and choices while a model is trained, by which CheckpointConfig may rank checkpoints.

`training` imports nothing of this folder: whoever starts a run hands `Answers` on to it.
"""

import contextlib
import dataclasses
import io
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from t5x_cpm import mesh as mesh_lib
from t5x_cpm import tasks
from t5x_cpm.config import Config, row_features
from t5x_cpm.inference import decode, evaluate, programs
from t5x_cpm.inference.engine import Engine
from t5x_cpm.vocabularies import Vocabulary


class Shared(programs.Resident):
  """A program on devices of several processes, all of which make the same calls, and get the same results whole."""

  def __init__(self, functions: programs.Functions, params: Any):
    super().__init__(functions, params)
    self._rows, everywhere = (jax.sharding.NamedSharding(functions.mesh, mesh_lib.spec(names)) for names in (('batch',), ()))
    self._gather = jax.jit(lambda tree: tree, out_shardings=everywhere)

  def _placed(self, tree: Any) -> Any:
    def place(x: Any) -> jax.Array:
      return jax.make_array_from_callback(np.shape(x), self._rows, lambda index: np.asarray(x)[index])

    return jax.tree.map(place, tree)

  def generate(self, rule: decode.Rule, batch: programs.Batch, prefix_BP: Any, stop_BE: Any, *, allowed: Any = None,
               seed: Any = 0, rows_B: Any = None) -> decode.Output:
    batch, prefix_BP, stop_BE, allowed, rows_B = self._placed((batch, prefix_BP, stop_BE, allowed, rows_B))
    return self._gather(super().generate(rule, batch, prefix_BP, stop_BE, allowed=allowed, seed=seed, rows_B=rows_B))

  def score(self, measure: programs.Measure, batch: programs.Batch) -> Any:
    return self._gather(super().score(measure, self._placed(batch)))


def _parts(config: Config) -> list[str]:
  mixed = tasks.parts(config)
  return [config.task.name] if mixed is None else list(mixed)


def _names(task: Any, examples: Sequence[evaluate.Example]) -> Iterator[str]:
  """The names of a task's metrics: what its functions return for a first answer that is right."""
  targets = [example.target for example in examples[:1]]
  given = ((task.predict_metric_fns, (targets, targets)), (task.score_metric_fns, (targets, [0.0] * len(targets))),
           (task.predict_with_aux_metric_fns, (targets, targets, {'scores': [0.0] * len(targets)})))
  for functions, arguments in given:
    for function in functions:
      try:
        yield from evaluate.numbers(function(*arguments))
      except Exception:  # a function of the user's that wants more examples: its own name is the best guess
        yield function.__name__


class Answers:
  """The metrics of the task of a run on its validation split: of generated answers, of choices, or of both.

  Attributes:
    names: of the metrics; of a mixture TASK/NAME.
    note: how they are measured, in words.
  """

  def __init__(self, config: Config, mesh: jax.sharding.Mesh, vocabulary: Vocabulary):
    """Reads the examples, at most TrainConfig.eval_batches batches of them or EvalConfig.max_examples.

    Args:
      config: the run's configuration; EvalConfig.batch_size inputs are answered together, as DecodeConfig says.
      mesh: that of the run.
      vocabulary: that of the run.

    Raises:
      ConfigError: the task has no such split or metric.
    """
    most = config.train.eval_batches * config.train.batch_size or config.eval.max_examples
    config = dataclasses.replace(config, eval=dataclasses.replace(config.eval, max_examples=most),
                                 infer=dataclasses.replace(config.infer, batch_size=config.eval.batch_size))
    program = Shared if jax.process_count() > 1 else programs.Resident
    self._engine = Engine(program(programs.build(config, mesh), None), vocabulary, config)
    self._parts: list[tuple[str, Any, list[evaluate.Example], Config]] = []
    self.names: set[str] = set()
    labels = _parts(config)
    for label in labels:
      own = evaluate.task_config(config, label)
      task = evaluate.open_task(own, vocabulary)
      row = evaluate.task_row(config, label, row_features.defaults(config))
      with contextlib.redirect_stderr(io.StringIO()):  # the run says by itself what it reads
        examples = evaluate.read_examples(task, self._engine, own, row)
      prefix = f'{label}/' if len(labels) > 1 else ''
      self._parts.append((prefix, task, examples, own))
      self.names |= {prefix + name for name in _names(task, examples)}
    count = sum(len(examples) for _, _, examples, _ in self._parts)
    self.note = f'answers to {count:,} inputs of {config.eval.split} are measured at each evaluation'

  def __call__(self, params: Any) -> dict[str, float]:
    """The metrics of parameters [...] of the whole model, as a checkpoint holds them. All processes call it together."""
    program: Any = self._engine.program
    functions = program.functions
    program.params = functions.prepare(jax.device_put(params, jax.tree.map(lambda leaf: leaf.sharding, functions.stored)))
    try:
      measured: dict[str, float] = {}
      for prefix, task, examples, config in self._parts:
        metrics, _ = evaluate.evaluate_pairs(self._engine, task, examples, config)
        measured |= {prefix + name: value for name, value in metrics.items() if name != 'examples'}
      return measured
    finally:
      program.params = None  # the memory is needed for training


def answers(config: Config, mesh: jax.sharding.Mesh, vocabulary: Vocabulary) -> Answers | None:
  """What training.run takes; None for a task of text, which has no answers."""
  return Answers(config, mesh, vocabulary) if evaluate.has_inputs(config) else None
