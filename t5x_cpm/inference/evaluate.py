"""`eval`: metrics, predictions and a table for every checkpoint and task that is asked for.

A task of text is evaluated as it was trained: loss, perplexity and accuracy on the masked tokens of the split, from its cache
and without TensorFlow. A task of inputs and targets has SeqIO metrics: of generated predictions, of the log-likelihood of
the targets, or of both. Texts have the form that the model's own run trained: TaskConfig.objective = 'pairs' says how the file
of a task is read, and no more. Results go to model_dir/eval/<step>/: metrics.json, and <task>.jsonl for each task with
predictions.
"""

import contextlib
import dataclasses
import json
import math
import os
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from t5x_cpm import backend, files, stored, tasks, vocabularies
from t5x_cpm.checkpoints import run_directory
from t5x_cpm.config import Config, ConfigError, row_features, to_dict
from t5x_cpm.data import cache as cache_lib
from t5x_cpm.data import reader as reader_lib
from t5x_cpm.data import report, rows
from t5x_cpm.inference import engine as engine_lib
from t5x_cpm.inference import text
from t5x_cpm.infmoe import about
from t5x_cpm.tasks import caches
from t5x_cpm.training import losses
from t5x_cpm.training.records import set_aside

Metrics = dict[str, float]
# The form of a file of results: a number or None for each metric of each task, and how they were made.
RESULTS = {str: {'metrics': {str: lambda value: value is None or type(value) in (int, float)}, str: dict}}


@dataclasses.dataclass(frozen=True)
class Example:
  """One example of a task of inputs and targets.

  Attributes:
    request: its input.
    target_ids: the tokens of its target.
    target: the target after the task's postprocessing, as metrics want it.
    features: all that the task gives, for postprocessing.
  """

  request: text.Request
  target_ids: list[int]
  target: Any
  features: dict[str, Any]


def task_config(config: Config, name: str) -> Config:
  """The configuration under which a task is read for evaluation."""
  return dataclasses.replace(config, task=dataclasses.replace(config.task, name=name))


def task_row(config: Config, name: str, otherwise: Mapping[str, int]) -> dict[str, int]:
  """What the rows of a task carry besides tokens.

  Args:
    config: names the task, or a mixture that it may be a task of.
    name: the name of the task.
    otherwise: the values to use where its place in the mixture does not decide.
  """
  if row_features.names(config) and name != config.task.name:
    with contextlib.suppress(ConfigError):  # what the run was trained on need not be known here
      mixed = list(tasks.parts(config) or ())
      if name in mixed:
        return row_features.of_task(config, mixed.index(name), len(mixed), otherwise)
  return dict(otherwise)


def has_inputs(config: Config) -> bool:
  """Whether a task has inputs of its own. Imports TensorFlow only for a task that is not cached and needs it."""
  path = caches.directory(config)
  if caches.is_ready(path):
    return 'inputs' in cache_lib.components(path)[0][1].features
  mixed = tasks.parts(config)
  if mixed:
    return has_inputs(task_config(config, next(iter(mixed))))
  return 'inputs' in tasks.tokens(config).features


def vocabulary_spec(config: Config, saved: vocabularies.Vocabulary) -> str:
  """TaskConfig.vocabulary for a task: that of `config` as long as it is the model's, because caches are named by it.

  Args:
    config: names the task.
    saved: the copy in the model_dir, which is taken where the file that the run was trained with is gone or has changed.
  """
  given = config.task.vocabulary
  path = caches.directory(config)
  if caches.is_ready(path) and not has_inputs(config) and all(
      cache.info['vocabulary'] == saved.fingerprint for _, cache in cache_lib.components(path)):
    return given  # the cache is all that is read
  for spec in (given, saved.spec):
    with contextlib.suppress(ConfigError):
      theirs = tasks.vocabulary(dataclasses.replace(config, task=dataclasses.replace(config.task, vocabulary=spec)))
      if theirs.fingerprint == saved.fingerprint:
        return spec
  return given


# Text: masked tokens.


def _sums(logits_BTV: jax.Array, batch: dict[str, jax.Array]) -> dict[str, Any]:
  """Pairs (sum, sum of weights) over the targets of a batch, and over those of `is_text` [B, T]."""
  targets = batch['decoder_target_tokens']
  sums = losses.cross_entropy(logits_BTV, targets, batch['decoder_loss_weights'], 0.0)[1]
  return sums | {'text_accuracy': losses.cross_entropy(logits_BTV, targets, batch['is_text'], 0.0)[1]['accuracy']}


def evaluate_text(engine: engine_lib.Engine, config: Config, row: Mapping[str, int] | None = None) -> Metrics:
  """Loss (nats), perplexity and accuracy over the targets of the split, each row once.

  Targets are the masked tokens and the sentinels between them, which are easy to predict; `text_accuracy` leaves the
  sentinels and the end of sequence out.

  Args:
    engine: the model.
    config: names the task.
    row: what rows carry besides tokens, where their task does not decide; by default what the configuration says.

  Raises:
    ConfigError: the model has a prompt, which stands in inputs.
  """
  if engine.config.delta.prompts:
    raise ConfigError(f'task {config.task.name!r} is one of text, and the prompt of this model stands in the inputs of pairs: '
                      'evaluate it on a task of inputs and targets, or its base on this one.')
  # The form of the model's own training; one that was trained on pairs has none for text.
  forms = [name for name in (engine.config.task.objective, config.task.objective, 'isolated') if name != 'pairs']
  most, size = config.eval.max_examples, engine.whole(config.eval.batch_size)
  config = dataclasses.replace(config, task=dataclasses.replace(config.task, objective=forms[0]),
                               train=dataclasses.replace(config.train, batch_size=size))
  reader = reader_lib.open_reader(caches.build(config), config, config.eval.split, vocabulary=engine.vocabulary,
                                  row=row_features.defaults(config) if row is None else row)
  for line in report.of_evaluation(reader, most, f'EvalConfig.max_examples = {most}'):
    print(f'eval: {line}', file=sys.stderr, flush=True)
  totals: dict[str, np.ndarray] = {}
  marks = np.asarray([*engine.vocabulary.sentinels, engine.vocabulary.eos_id])
  for number, batch in enumerate(reader.eval_batches(-(-most // size))):
    if most:
      batch['decoder_loss_weights'][most - number * size:] = 0.0
    batch['is_text'] = batch['decoder_loss_weights'] * ~np.isin(batch['decoder_target_tokens'], marks)
    for name, pair in jax.device_get(engine.program.score(_sums, batch)).items():
      totals[name] = totals.get(name, np.zeros(2)) + np.asarray(pair, np.float64)
  means = {name: float(total / max(weight, 1e-9)) for name, (total, weight) in totals.items()}
  return {'loss': means['loss'], 'perplexity': math.exp(min(means['loss'], 700.0)), 'accuracy': means['accuracy'],
          'text_accuracy': means['text_accuracy'], 'targets': float(totals['loss'][1])}


# Inputs and targets: the task's SeqIO metrics.


def _example(task: Any, features: Mapping[str, Any], codec: text.Codec, is_marked: bool = False) -> Example:
  vocabulary = codec.vocabulary
  ids, texts = {}, {}
  for side in ('inputs', 'targets'):
    given = features[side].tolist()
    ids[side] = given[:-1] if given[-1:] == [vocabulary.eos_id] else given
    written = features.get(f'{side}_pretokenized')
    texts[side] = written.decode() if isinstance(written, bytes) else vocabulary.decode(ids[side])
  if codec.is_pairs:
    request = codec.task_request(texts['inputs'], None if is_marked else ids['inputs'])
    target_ids = codec.targets(request, texts['targets']) if codec.is_span else ids['targets'] + codec.end
  else:  # a model that fills blanks continues the inputs
    request = codec.request(texts['inputs'])
    target_ids = codec.targets(request, texts['targets'])
  target = task.postprocess_fn(texts['targets'], example=features, is_target=True)
  return Example(request, target_ids, target, dict(features))


def read_examples(task: Any, engine: engine_lib.Engine, config: Config, row: Mapping[str, int]) -> list[Example]:
  """The examples of a SeqIO task in order, their inputs cut to TaskConfig.encoder_length as in training; says what was cut."""
  import seqio
  import tensorflow as tf

  from t5x_cpm.tasks import sources

  tf.random.set_seed(0)  # for preprocessors that draw; a function data source need not take a seed
  seed = None if isinstance(task.source, seqio.FunctionDataSource) else 0
  room = config.task.encoder_length - engine.config.delta.prompts  # for the tokens of an input, as in training
  limits = dataclasses.replace(config.infer, input_length=room, truncate=True)
  codec = text.Codec(engine.vocabulary, text.of_model(dataclasses.replace(config, infer=limits), engine.config), row)
  examples: list[Example] = []
  rest = ''
  with sources.errors():
    for features in task.get_dataset(None, config.eval.split, shuffle=False, seed=seed).as_numpy_iterator():
      if len(examples) == config.eval.max_examples > 0:
        rest = f'; EvalConfig.max_examples = {config.eval.max_examples} leaves out the rest'
        break
      examples.append(_example(task, features, codec, config.marks > 0))
  text.tell_notes((example.request for example in examples), config.task.name)
  cut = sum(example.request.is_cut for example in examples)
  after = (f', the inputs of {cut:,} cut to {limits.input_length:,} tokens' if cut else '') + rest
  found = {'documents': len(examples), 'skipped': getattr(task.source, 'skipped', {})}
  print(f'eval: {config.eval.split}: {rows.in_words(found, "example", after=after)}', file=sys.stderr, flush=True)
  return examples


def _plain(value: Any) -> Any:
  """A postprocessed target or prediction in the types that JSON has."""
  if isinstance(value, bytes):
    return value.decode(errors='replace')
  if isinstance(value, np.ndarray | np.generic):
    return value.tolist()
  if isinstance(value, list | tuple):
    return [_plain(item) for item in value]
  if isinstance(value, Mapping):
    return {str(key): _plain(item) for key, item in value.items()}
  return value if isinstance(value, str | int | float | bool | None) else str(value)


def numbers(values: Mapping[str, Any]) -> Metrics:
  """Metrics as floats. SeqIO may wrap numbers in types of its own; anything but a number has no place in a table."""
  plain = {name: getattr(value, 'value', value) for name, value in values.items()}
  return {name: float(value) for name, value in plain.items() if isinstance(value, int | float | np.number)}


def evaluate_pairs(engine: engine_lib.Engine, task: Any, examples: Sequence[Example],
                   config: Config) -> tuple[Metrics, list[dict]]:
  """The metrics of a task over its examples, and a record of each example."""
  requests = [example.request for example in examples]
  targets = [example.target for example in examples]
  records = [{'input': request.text, 'target': _plain(target)} for request, target in zip(requests, targets)]
  metrics: Metrics = {'examples': float(len(examples))}
  if task.predict_metric_fns or task.predict_with_aux_metric_fns:
    answers = engine.answer_requests(requests, config.decode)
    predictions = []
    for record, example, answer in zip(records, examples, answers):
      prediction = task.postprocess_fn(answer.output, example=example.features, is_target=False)
      record |= {'output': answer.output, 'prediction': _plain(prediction)}
      predictions.append(prediction)
    for function in task.predict_metric_fns:
      metrics |= numbers(function(targets, predictions))
    for function in task.predict_with_aux_metric_fns:
      metrics |= numbers(function(targets, predictions, {'scores': [answer.score for answer in answers]}))
  if task.score_metric_fns:
    scores, _ = engine.score_ids(requests, [example.target_ids for example in examples])
    for record, value in zip(records, scores):
      record['score'] = value
    for function in task.score_metric_fns:
      metrics |= numbers(function(targets, scores))
  return metrics, records


# Runs.


def open_task(config: Config, vocabulary: vocabularies.Vocabulary) -> Any:
  """The SeqIO task that a configuration names, with inputs and targets.

  Raises:
    ConfigError: it has another vocabulary than the model's, no such split as EvalConfig.split, or no metric.
  """
  name, theirs = config.task.name, tasks.vocabulary(config)
  if theirs.fingerprint != vocabulary.fingerprint:
    raise ConfigError(f'task {name!r} was made with the vocabulary {theirs.spec!r}, but the model uses '
                      f'{vocabulary.spec!r}: set TaskConfig.vocabulary to the vocabulary of the model.')
  with backend.quiet():
    from t5x_cpm.tasks import make  # noqa: F401  # imports TensorFlow
  task = tasks.get(config)
  if config.eval.split not in task.splits:
    raise ConfigError(
        f'task {name!r} has no split {config.eval.split!r}: set EvalConfig.split to one of {", ".join(task.splits)}.')
  if not task.metric_fns:
    raise ConfigError(f'task {name!r} has inputs and targets, but no metric.')
  return task


def evaluate_task(engine: engine_lib.Engine, config: Config, name: str,
                  row: Mapping[str, int] | None = None) -> dict[str, tuple[Metrics, list[dict]]]:
  """Metrics and records of a task, or of each task of a mixture of inputs and targets.

  Args:
    engine: the model.
    config: the configuration of the run, or of a mixture that the task may belong to.
    name: the name of the task or mixture.
    row: what rows carry besides tokens, where the mixture does not decide; by default what the configuration says.

  Raises:
    ConfigError: there is no such task, split or metric.
  """
  row = task_row(config, name, row_features.defaults(config) if row is None else row)
  config = task_config(config, name)
  if not has_inputs(config):
    return {name: (evaluate_text(engine, config, row), [])}
  mixed = tasks.parts(config)
  if mixed:
    return {label: result for task in mixed for label, result in evaluate_task(engine, config, task, row).items()}
  task = open_task(config, engine.vocabulary)
  return {name: evaluate_pairs(engine, task, read_examples(task, engine, config, row), config)}


def _format(value: float) -> str:
  return f'{value:,.0f}' if value == round(value) and abs(value) >= 1000 else f'{value:.4g}'


def table(step: int, results: Mapping[str, Metrics]) -> str:
  """A table with tasks in rows and metrics in columns."""
  columns = list(dict.fromkeys(name for metrics in results.values() for name in metrics))
  lines = [[f'step {step}', *columns]]
  for task, metrics in results.items():
    lines.append([task, *(_format(metrics[name]) if name in metrics else '-' for name in columns)])
  widths = [max(len(line[column]) for line in lines) for column in range(len(columns) + 1)]
  rows = []
  for first, *rest in lines:
    rows.append('  '.join([first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(rest, widths[1:]))]))
  return '\n'.join(rows)


def write(model_dir: Any, step: int, config: Config, results: Mapping[str, tuple[Metrics, list[dict]]]) -> None:
  """Writes the results of a checkpoint beside those that are there already. Raises ConfigError where it cannot."""
  folder = run_directory.resolve(model_dir) / 'eval' / str(step)
  try:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / 'metrics.json'
    known = {}
    if os.path.lexists(path) or path.exists():
      try:
        known = stored.parse(path, '', finite=False)
        stored.require(path, known, RESULTS, '')
      except stored.DamagedError as error:
        known = {}
        set_aside(path, f'is damaged ({error.what})')
    for task, (metrics, records) in results.items():
      known[task] = {'metrics': metrics, 'EvalConfig': to_dict(config.eval), 'DecodeConfig': to_dict(config.decode)}
      if records:
        lines = ''.join(json.dumps(record, ensure_ascii=False) + '\n' for record in records)
        files.write_atomically(folder / (re.sub(r'[^\w.-]+', '_', task) + '.jsonl'), lines.encode())
    files.write_atomically(path, (json.dumps(known, ensure_ascii=False, indent=2) + '\n').encode())
  except OSError as error:
    raise ConfigError(f'{folder} cannot be written: {error.strerror}.') from None


def chosen_steps(config: Config, model_dir: Any) -> list[int]:
  """The checkpoints that EvalConfig.checkpoints names."""
  if config.eval.checkpoints == 'all':
    return about.read_run(model_dir).steps
  step = None if config.eval.checkpoints == 'last' else int(config.eval.checkpoints)
  return [about.read_run(model_dir, step).step]


def run(config: Config, model_dir: str, names: Sequence[str]) -> dict[int, dict[str, Metrics]]:
  """Evaluates checkpoints on tasks, writes the results, and prints a table for each checkpoint.

  Args:
    config: the run's configuration, with EvalConfig and DecodeConfig as wanted.
    model_dir: the run's directory.
    names: the names of tasks or mixtures.

  Returns:
    step -> task -> metric -> value.

  Raises:
    ConfigError: there is no such checkpoint, task, split or metric.
  """
  config.eval.validate()
  config.decode.validate()
  backend.hide_logs()
  names = [name.strip() for name in names if name.strip()]
  if not names:
    raise ConfigError('eval needs --tasks=NAME,...; `t5x_cpm tasks` lists them.')
  saved = vocabularies.load_saved(run_directory.resolve(model_dir) / 'vocabulary')
  specs = {}
  for name in names:  # before a model is read, so that a misspelt name is refused at once
    specs[name] = vocabulary_spec(task_config(config, name), saved)
    if specs[name] != config.task.vocabulary:
      print(f'eval: TaskConfig.vocabulary = {config.task.vocabulary!r} is not the vocabulary of the model, or gone; '
            f'{name} is read with the copy in {model_dir}', file=sys.stderr, flush=True)
  config = dataclasses.replace(config, infer=dataclasses.replace(config.infer, batch_size=config.eval.batch_size))
  steps = chosen_steps(config, model_dir)
  engine = engine_lib.load(model_dir, step=steps[0], config=config)
  summary = {}
  for step in steps:
    if step != engine.step:
      engine.read(model_dir, step)
    results: dict[str, tuple[Metrics, list[dict]]] = {}
    for name in names:
      print(f'eval: step {step}, {name}', file=sys.stderr, flush=True)
      task = dataclasses.replace(config.task, vocabulary=specs[name])
      results |= evaluate_task(engine, dataclasses.replace(config, task=task), name)
    write(model_dir, step, config, results)
    summary[step] = {task: metrics for task, (metrics, _) in results.items()}
    print(table(step, summary[step]), flush=True)
  return summary
