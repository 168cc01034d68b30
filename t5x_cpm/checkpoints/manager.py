"""The checkpoints of a run: written in the background by Orbax, restored bit for bit on any mesh."""

import bisect
import contextlib
import json
import math
import sys
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import jax

from t5x_cpm import files, stored, trees
from t5x_cpm.checkpoints import arrays, digests, quiet, run_directory
from t5x_cpm.checkpoints.run_directory import CheckpointError, resolve
from t5x_cpm.config import CheckpointConfig, Config, ConfigError

DELETED = '.deleted'  # folder of checkpoints that are being deleted


class _Keep:
  """Which checkpoints stay: the newest `keep`, and the best `keep_best` of those that have the metric."""

  def __init__(self, config: CheckpointConfig):
    self.config = config

  def should_preserve(self, checkpoints: Any, *, context: Any) -> list[bool]:
    config, count = self.config, len(checkpoints)
    newest = set(range(count - config.keep, count)) if config.keep else set(range(count))
    sign = 1 if config.best_mode == 'min' else -1
    scores = {}
    for index, checkpoint in enumerate(checkpoints):
      value = (checkpoint.metrics or {}).get(config.best_metric, math.nan)
      if math.isfinite(value):
        scores[index] = sign * value
    best = sorted(scores, key=lambda index: scores[index])[:config.keep_best]
    return [index in newest or index in best for index in range(count)]


def _wait_for_all(name: str) -> None:
  if jax.process_count() > 1:
    from jax.experimental import multihost_utils

    multihost_utils.sync_global_devices(f't5x_cpm.checkpoint.{name}')


class Manager:
  """Writes and restores the checkpoints of one run.

  Every process of the run makes one and calls it in the same order. As a context manager it closes itself; a save in
  progress is completed even when an exception leaves the block.
  """

  def __init__(self, model_dir: Any, config: Config, *, info: dict[str, Any], may_differ: Collection[str] = ()):
    """Makes model_dir usable, or says why it is not, before anything in it is changed.

    Args:
      model_dir: made if it does not exist.
      config: compared field by field with that of the last checkpoint.
      info: JSON tree of what else must not change between starts: fingerprints of the vocabulary and of the data.
      may_differ: entries of info that may have changed all the same.

    Raises:
      CheckpointError: the directory cannot be written, belongs to something else, or holds a run of another identity.
    """
    import orbax.checkpoint as ocp

    self.model_dir, self.info = resolve(model_dir), info
    self._primary = jax.process_index() == 0
    self._meta = run_directory.describe(config, info)
    self._failed = False
    self._keep = config.checkpoint
    self._scores: list[float] = []  # the metric of every checkpoint that has one, the best first
    with contextlib.ExitStack() as claim:
      if self._primary:
        claim.enter_context(run_directory.claim(self.model_dir))
      _wait_for_all('claimed')
      run_directory.check_identity(self.model_dir, config, info, may_differ)
      _wait_for_all('checked')
      if self._primary:
        self._clear_partial()
        for step in run_directory.scan(self.model_dir)[0]:
          run_directory.check_files(self.model_dir, step)
      self._read_metrics()
      if self._primary:
        text = json.dumps(self._meta, ensure_ascii=False, indent=2) + '\n'
        with run_directory.writing(self.model_dir / 'config.json'):
          files.write_atomically(self.model_dir / 'config.json', text.encode())
        self._check_writable()
      _wait_for_all('ready')
      if not (self.model_dir / 'config.json').exists():
        raise CheckpointError(
            f'--model_dir={self.model_dir}: process {jax.process_index()} does not see what process 0 has written there. Give '
            'a directory that all hosts share, or a bucket.')
      claim.enter_context(quiet.quiet_orbax())  # until the manager is closed: saves fail in threads, at any time
      with self._opening():
        self._orbax = ocp.CheckpointManager(
            self.model_dir / 'checkpoints',
            options=ocp.CheckpointManagerOptions(
                # _Keep ranks by the metric; without a best_fn Orbax would not store it.
                best_fn=lambda metrics: metrics.get(config.checkpoint.best_metric, math.nan),
                preservation_policy=_Keep(config.checkpoint),
                # A checkpoint that a kill left half deleted could look complete, so it is moved away first.
                todelete_subdir=DELETED))
      self._claim = claim.pop_all()

  def _clear_partial(self) -> None:
    """Reports the half-written checkpoints that a killed run left, and deletes them, or renames those that look copied."""
    for path in run_directory.scan(self.model_dir)[1]:
      print(f'Ignoring a half-written checkpoint, left by a run that was stopped: {path}', file=sys.stderr, flush=True)
      if path.name.isascii() and path.name.isdecimal():  # copied in part, perhaps by hand: kept, under another name
        path.rename(path.parent / f'incomplete-{path.name}')
      else:
        path.rmtree()
    self._purge()

  def _read_metrics(self) -> None:
    """Notes the metrics of every checkpoint, and mends those by which Orbax ranks it where they are others."""
    for step in run_directory.scan(self.model_dir)[0]:
      with contextlib.suppress(CheckpointError):  # a damaged description: told when this checkpoint is read
        metrics = run_directory.read_meta(self.model_dir, step)['metrics']
        self._note(metrics)
        if self._primary:
          self._mend(self.model_dir / 'checkpoints' / str(step) / 'metrics' / 'metrics', metrics)

  def _mend(self, path: Any, metrics: dict[str, float]) -> None:
    """Writes the file that Orbax ranks a checkpoint by anew where it does not hold the metrics of the description."""
    with contextlib.suppress(ConfigError):
      if json.dumps(stored.parse(path, '', finite=False)) == json.dumps(metrics):
        return
    print(f'{path} is damaged: written anew from the description of the checkpoint.', file=sys.stderr, flush=True)
    with run_directory.writing(path):
      files.write_atomically(path, json.dumps(metrics).encode())

  def _check_writable(self) -> None:
    """Raises CheckpointError where a save would fail at once: Orbax would find it out in a thread that nobody waits for."""
    probe = self.model_dir / 'checkpoints' / '.write_probe'
    if not (self.model_dir / 'config.json').exists():
      raise CheckpointError(
          f'--model_dir={self.model_dir} was deleted or unmounted while the run used it (it has no config.json any more): '
          'nothing can be saved there.')
    with run_directory.writing(probe.parent):
      probe.mkdir(parents=True, exist_ok=True)
      probe.rmdir()

  @contextlib.contextmanager
  def _opening(self) -> Iterator[None]:
    """Orbax reads small files of every checkpoint when it opens a directory."""
    try:
      yield
    except Exception as error:
      raise CheckpointError(f'{self.model_dir / "checkpoints"} cannot be opened: {quiet.reason(error)}. Move the checkpoint '
                            'that this speaks of away.') from error

  def _purge(self) -> None:
    deleted = self.model_dir / 'checkpoints' / DELETED
    if self._primary and deleted.exists():
      deleted.rmtree()

  def _score(self, metrics: Mapping[str, float]) -> float:
    """What checkpoints are ranked by, less being better; NaN where it is not known."""
    value = metrics.get(self._keep.best_metric, math.nan)
    return value if self._keep.best_mode == 'min' else -value

  def _note(self, metrics: Mapping[str, float]) -> None:
    if math.isfinite(score := self._score(metrics)):
      bisect.insort(self._scores, score)

  def is_among_best(self, metrics: Mapping[str, float]) -> bool:
    """Whether a checkpoint with these metrics would be one of the CheckpointConfig.keep_best best. Every process agrees."""
    score, count = self._score(metrics), self._keep.keep_best
    return count > 0 and math.isfinite(score) and (len(self._scores) < count or score < self._scores[count - 1])

  def latest_step(self) -> int | None:
    """The step of the last complete checkpoint."""
    steps, _ = run_directory.scan(self.model_dir)
    return steps[-1] if steps else None

  def last_words(self) -> str:
    """What the message about a run that fails says of its checkpoints. Waits for the save in progress."""
    with contextlib.suppress(CheckpointError):
      self.wait()
    last = self.latest_step()
    return 'There is no checkpoint yet.' if last is None else f'The last checkpoint, of step {last}, is intact.'

  def save(self, step: int, state: Any, metrics: Mapping[str, float] | None = None, *, axes: Any = None) -> None:
    """Starts writing a checkpoint; returns when the state has been copied, so that it may be donated or changed.

    Waits for the previous save first. Does nothing if this step is saved already.

    Args:
      step: updates done.
      state: tree of arrays.
      metrics: by name, for CheckpointConfig.keep_best and for readers of the checkpoint.
      axes: logical axes of the state (Step.axes), by which stacks of layers are cut into chunks. None: it has no stacks.

    Raises:
      CheckpointError: the previous save failed, or this one failed at once.
    """
    import orbax.checkpoint as ocp

    self.wait()
    if step in run_directory.scan(self.model_dir)[0]:
      return
    if self._primary:
      self._check_writable()
    values = {name: float(value) for name, value in (metrics or {}).items()}
    meta = self._meta | {'step': step, 'metrics': values, 'arrays': digests.of_tree(state)}
    args = ocp.args.Composite(
        state=ocp.args.PyTreeSave(state, save_args=arrays.save_args(state, axes)),
        meta=ocp.args.JsonSave(meta | {'seal': run_directory.seal(meta)}))
    with self._one_error():
      self._orbax.save(step, args=args, metrics=values, force=True)
    self._note(values)

  @contextlib.contextmanager
  def _one_error(self) -> Iterator[None]:
    """Turns any failure of a save into one message, and deletes what the save had written."""
    try:
      yield
    except Exception as error:
      self._failed = True
      if self._primary:
        for path in run_directory.scan(self.model_dir)[1]:
          with contextlib.suppress(OSError):
            path.rmtree()
      reason = quiet.reason(error)
      last = self.latest_step()
      intact = 'There is no earlier checkpoint.' if last is None else f'Those up to step {last} are intact.'
      advice = 'Make room, or lower CheckpointConfig.keep, and start' if 'no space' in reason.lower() else 'Start'
      raise CheckpointError(
          f'Writing a checkpoint to {self.model_dir / "checkpoints"} failed: {reason}. {intact} {advice} the same command '
          'again to continue.') from error

  def wait(self) -> None:
    """Returns when the save in progress is complete; raises CheckpointError if it failed."""
    with self._one_error():
      self._orbax.wait_until_finished()
    self._purge()

  def close(self) -> None:
    """Waits, and releases the threads. Raises CheckpointError if the last save failed and this has not been raised yet."""
    try:
      if not self._failed:
        self.wait()
    finally:
      self._orbax.close()
      self._claim.close()

  def __enter__(self) -> 'Manager':
    return self

  def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
    try:
      self.close()
    except CheckpointError as own:
      if error is None:
        raise
      print(own, file=sys.stderr, flush=True)  # in addition to the error on its way, not instead of it

  def restore(self, abstract_state: Any, step: int | None = None) -> Any:
    """The state of a checkpoint, bit for bit, on the given shardings.

    Args:
      abstract_state: tree of jax.ShapeDtypeStruct with shardings, such as Step.abstract_state.
      step: the step of the checkpoint; by default the last.

    Raises:
      CheckpointError: the checkpoint does not exist or is damaged, or a tensor is missing, left over, or of another shape or
        dtype.
    """
    step = run_directory.choose(self.model_dir, step)
    return arrays.read_or_offer(self.model_dir, step, lambda step: self._restore(abstract_state, step))

  def _restore(self, abstract_state: Any, step: int) -> Any:
    meta = run_directory.read_meta(self.model_dir, step)
    hint = 'It was written with another model or optimizer: set ModelConfig and OptimizerConfig as they were.'
    saved, path = arrays.stored(self.model_dir, step, meta), self.model_dir / 'checkpoints' / str(step)
    arrays.compare(saved, trees.named(abstract_state), path, hint, dtypes=True)
    return arrays.read(self.model_dir, step, meta, abstract_state)
