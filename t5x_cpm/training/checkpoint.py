HEAD
@contextlib.contextmanager
def _quiet_orbax() -> Iterator[None]:
  """Keeps Orbax's log out of the terminal: it prints every failure of a save thread with four tracebacks, and raises it too."""
  logger = logging.getLogger('absl')

  def keep(record: logging.LogRecord) -> bool:
    return 'orbax' not in record.pathname

  logger.addFilter(keep)
  try:
    yield
  finally:
    logger.removeFilter(keep)


def _save_args(path: tuple[Any, ...], leaf: Any) -> Any:
  """How one array is cut into chunks: a slice of one layer, or of one expert of one layer, is one chunk."""
  import orbax.checkpoint as ocp

  names = jax.tree_util.keystr(path, simple=True, separator='/').split('/')
  if 'experts' in names and leaf.ndim == 4:  # [layers, experts, in, out]
    return ocp.SaveArgs(shard_axes=(0, 1))
  if leaf.ndim > 1 and ('layers' in names or 'experts' in names):
    return ocp.SaveArgs(shard_axes=(0,))
  if leaf.nbytes > MAX_CHUNK_BYTES:
    return ocp.SaveArgs(chunk_byte_size=MAX_CHUNK_BYTES)
  return ocp.SaveArgs()


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


class Manager:
  """Writes and restores the checkpoints of one run. Every process of the run makes one and calls it in the same order."""

  def __init__(self, model_dir: Any, config: Config, *, info: dict[str, Any]):
    """Makes model_dir usable, or says why it is not.

    Args:
      model_dir: made if it does not exist; a relative path is resolved now.
      config: compared field by field with that of the last checkpoint.
      info: JSON tree of what else must not change between starts: fingerprints of the vocabulary and of the data.

    Raises:
      CheckpointError: the directory cannot be written, belongs to something else, or holds a run with another identity.
    """
    import orbax.checkpoint as ocp

    self.model_dir = resolve(model_dir)
    self.config = config
    self._primary = jax.process_index() == 0
    self._meta = {
        'format_version': FORMAT_VERSION, 'code_version': t5x_cpm.__version__, 'config': to_dict(config),
        'info': json.loads(json.dumps(info))}
    self._failed = False
    if self._primary:
      self._claim()
    _wait_for_all('model_dir')
    self._check_identity()
    if self._primary:
      self._clear_partial()
      _write_atomically(self.model_dir / 'config.json', json.dumps(self._meta, ensure_ascii=False, indent=2) + '\n')
    _wait_for_all('config.json')
    with _quiet_orbax():
      self._orbax = ocp.CheckpointManager(
          self.model_dir / 'checkpoints',
          options=ocp.CheckpointManagerOptions(
              # The metric is read by _Keep; without a best_fn Orbax would not store it.
              best_fn=lambda metrics: metrics.get(config.checkpoint.best_metric, math.nan),
              preservation_policy=_Keep(config.checkpoint),
              # A directory that a kill left half deleted would look complete, so it is renamed first.
              todelete_subdir=DELETED))

  def _claim(self) -> None:
    """Creates the directory, checks that it is empty or a run's, and that it can be written."""
    path = self.model_dir
    try:
      path.mkdir(parents=True, exist_ok=True)
      probe = path / '.write_probe'
      probe.write_text('')
      probe.unlink()
    except OSError as error:
      raise CheckpointError(f'--model_dir={path} cannot be written: {error.strerror or error}.') from error
    names = sorted(entry.name for entry in path.iterdir() if not entry.name.startswith('.'))
    if names and 'config.json' not in names:
      raise CheckpointError(
          f'--model_dir={path} is not empty and not the model_dir of a run (no config.json; it holds {", ".join(names[:5])}). '
          'Give an empty or new directory.')

  def _check_identity(self) -> None:
    steps, _ = _scan(self.model_dir)
    if not steps:
      return
    saved = _read_meta(self.model_dir, steps[-1])
    lines = identity_differences(from_dict(saved['config']), self.config)
    lines += info_differences(saved['info'], self._meta['info'])
    if lines:
      raise CheckpointError(
          f'--model_dir={self.model_dir} holds checkpoint {steps[-1]} of another run:\n  ' + '\n  '.join(lines) +
          '\nContinue with the same values, or start a new --model_dir (with --init_from, from these parameters).')

  def _clear_partial(self) -> None:
    """Says which half-written checkpoints a killed run left, and puts them where no one looks."""
    for path in _scan(self.model_dir)[1]:
      print(f'Ignoring a half-written checkpoint, left by a run that was stopped: {path}', file=sys.stderr, flush=True)
      if path.name.isdigit():  # not ours, or copied in part: kept, under another name
        path.rename(path.parent / f'incomplete-{path.name}')
      else:
        path.rmtree()
    self._purge()

  def _purge(self) -> None:
    deleted = self.model_dir / 'checkpoints' / DELETED
    if self._primary and deleted.exists():
      deleted.rmtree()

  def latest_step(self) -> int | None:
    """The step of the last complete checkpoint."""
    steps, _ = _scan(self.model_dir)
    return steps[-1] if steps else None

  def save(self, step: int, state: Any, metrics: dict[str, float] | None = None) -> None:
    """Starts writing a checkpoint and returns when the state has been copied, so that it may be donated or changed.

    Does nothing if this step has been saved. Waits for the previous save first.

    Args:
      step: updates done.
      state: tree of arrays.
      metrics: by name, for CheckpointConfig.keep_best and for who reads the checkpoint.

    Raises:
      CheckpointError: the previous save failed, this one failed at once, or `metrics` lacks the metric to rank by.
    """
    import orbax.checkpoint as ocp

    options = self.config.checkpoint
    if metrics is not None and options.keep_best and options.best_metric not in metrics:
      raise CheckpointError(
          f'CheckpointConfig.best_metric = {options.best_metric!r}: expected one of {", ".join(sorted(metrics))}.')
    self.wait()
    if step in _scan(self.model_dir)[0]:
      return
    metrics = {name: float(value) for name, value in (metrics or {}).items()}
    meta = self._meta | {'step': step, 'metrics': metrics}
    args = ocp.args.Composite(
        state=ocp.args.PyTreeSave(state, save_args=jax.tree_util.tree_map_with_path(_save_args, state)),
        meta=ocp.args.JsonSave(meta))
    with self._errors():
      self._orbax.save(step, args=args, metrics=metrics, force=True)

  @contextlib.contextmanager
  def _errors(self) -> Iterator[None]:
    """Turns any failure of a save into one message, and frees what it had written."""
    try:
      with _quiet_orbax():
        yield
    except Exception as error:
      self._failed = True
      if self._primary:
        for path in _scan(self.model_dir)[1]:
          with contextlib.suppress(OSError):
            path.rmtree()
      reason = str(error).splitlines()[0] if str(error) else type(error).__name__
      if 'No space left' in str(error):
        reason = 'no space left on the device'
      last = self.latest_step()
      intact = 'There is no earlier one.' if last is None else f'Those up to step {last} are intact.'
      raise CheckpointError(
          f'Writing a checkpoint to {self.model_dir / "checkpoints"} failed: {reason}. {intact} Make room (or lower '
          'CheckpointConfig.keep) and start the same command again.') from error

  def wait(self) -> None:
    """Returns when the save in progress is complete; raises CheckpointError if it failed."""
    with self._errors():
      self._orbax.wait_until_finished()
    self._purge()

  def close(self) -> None:
    """Waits, and releases the threads. Raises CheckpointError if the last save failed."""
    try:
      if not self._failed:
        self.wait()
    finally:
      with _quiet_orbax():
        self._orbax.close()

  def restore(self, abstract_state: Any, step: int | None = None) -> Any:
    """The state of a checkpoint, bit for bit, on the given shardings.

    Args:
      abstract_state: tree of jax.ShapeDtypeStruct with shardings, such as Step.abstract_state.
      step: default: the last.

    Raises:
      CheckpointError: no such checkpoint, or a tensor is missing, left over, or has another shape or dtype.
    """
    step = _choose(self.model_dir, step)
    return _restore(self.model_dir / 'checkpoints' / str(step) / 'state', abstract_state)


def _wait_for_all(name: str) -> None:
  if jax.process_count() > 1:
    from jax.experimental import multihost_utils

    multihost_utils.sync_global_devices(f't5x_cpm.checkpoint.{name}')


def _stored(path: epath.Path) -> dict[str, Any]:
  """Name -> shape and dtype of every array of a saved tree. Reads no array."""
  import orbax.checkpoint as ocp

  tree = ocp.PyTreeCheckpointHandler().metadata(path).tree
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {jax.tree_util.keystr(keys, simple=True, separator='/'): leaf for keys, leaf in leaves}


def _read(path: epath.Path, abstract: Any) -> Any:
  """The arrays named by a tree of ShapeDtypeStruct with shardings; what else is stored there is not read."""
  import orbax.checkpoint as ocp

  restore_args = ocp.checkpoint_utils.construct_restore_args(abstract)
  with _quiet_orbax():
    try:
      return ocp.PyTreeCheckpointHandler().restore(
          path, args=ocp.args.PyTreeRestore(abstract, restore_args=restore_args, partial_restore=True))
    except (OSError, ValueError) as error:
      raise CheckpointError(
          f'The checkpoint {path.parent} is damaged: {str(error).splitlines()[0]} Move it away to use an earlier one.') from error


def _named(tree: Any) -> dict[str, Any]:
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {jax.tree_util.keystr(keys, simple=True, separator='/'): leaf for keys, leaf in leaves}


def _compare(stored: Mapping[str, Any], wanted: Mapping[str, Any], path: epath.Path, hint: str, dtypes: bool) -> None:
  """Raises CheckpointError with up to five tensors whose presence, shape or (if asked) dtype differ."""
  lines = []
  for name in sorted(stored.keys() | wanted.keys()):
    if name not in stored:
      lines.append(f'{name}: not in the checkpoint')
    elif name not in wanted:
      lines.append(f'{name}: in the checkpoint, but not in the model')
    elif tuple(stored[name].shape) != tuple(wanted[name].shape):
      lines.append(f'{name}: {list(stored[name].shape)} in the checkpoint, {list(wanted[name].shape)} in the model')
    elif dtypes and stored[name].dtype != wanted[name].dtype:
      lines.append(f'{name}: {stored[name].dtype} in the checkpoint, {wanted[name].dtype} in the model')
  if lines:
    more = [f'and {len(lines) - 5} more'] if len(lines) > 5 else []
    raise CheckpointError(f'The checkpoint {path.parent} does not fit:\n  ' + '\n  '.join(lines[:5] + more) + f'\n{hint}')


def _restore(path: epath.Path, abstract_state: Any) -> Any:
  hint = 'It was written with another model or optimizer: set ModelConfig and OptimizerConfig as they were.'
  _compare(_stored(path), _named(abstract_state), path, hint, dtypes=True)
  return _read(path, abstract_state)


def _renamed(names: list[str], rename: Mapping[str, str | None], path: epath.Path) -> dict[str, str]:
  """Stored name -> new name, by the longest prefix that `rename` has; names renamed to None are left out."""
  result, used = {}, set()
  for name in names:
    prefixes = [old for old in rename if name == old or name.startswith(old + '/')]
    old = max(prefixes, key=len, default=None)
    used.update(prefixes)
    new = name if old is None else rename[old]
    if new is not None:
      result[name] = new if old is None else new + name[len(old):]
  for old in rename:
    if old not in used:
      raise CheckpointError(f'rename: the checkpoint {path.parent} has no parameter {old!r}: it has {", ".join(names[:8])} ...')
  if len(set(result.values())) < len(result):
    raise CheckpointError(f'rename gives two parameters of the checkpoint {path.parent} one name: {dict(rename)}.')
  return result


def _nested(leaves: Mapping[str, Any]) -> dict[str, Any]:
  tree: dict[str, Any] = {}
  for name, leaf in leaves.items():
    *parents, last = name.split('/')
    node = tree
    for parent in parents:
      node = node.setdefault(parent, {})
    node[last] = leaf
  return tree


def load_params(
    model_dir: Any, *, step: int | None = None, into: Any = None, rename: Mapping[str, str | None] | None = None,
    shardings: Any = None) -> Any:
  """The parameters of a checkpoint alone: no optimizer state is read.

  Args:
    model_dir: of the run.
    step: default: the last checkpoint.
    into: tree of shapes and dtypes that the parameters must fit (names and shapes; the dtype is converted to). None: as
      stored.
    rename: {'old/path': 'new/path'}, of parameters or whole subtrees; {'old/path': None} leaves it out. A parameter that
      is in the checkpoint and not in `into` is an error unless it is left out so.
    shardings: tree like the result, or one sharding for all. None: those of `into`, else the first device.

  Returns:
    A nested dict of arrays.

  Raises:
    CheckpointError: no such checkpoint, or a parameter that is missing, left over or has another shape, by name.
  """
  model_dir = resolve(model_dir)
  step = _choose(model_dir, step)
  _read_meta(model_dir, step)
  path = model_dir / 'checkpoints' / str(step) / 'state'
  prefix = 'params/'
  stored = {name[len(prefix):]: leaf for name, leaf in _stored(path).items() if name.startswith(prefix)}
  new_names = _renamed(list(stored), rename or {}, path)
  renamed = {new: stored[old] for old, new in new_names.items()}
  wanted = renamed if into is None else _named(into)
  hint = 'Set ModelConfig as it was, or give `rename` (to None, for what is to be left out).'
  _compare(renamed, wanted, path, hint, dtypes=False)

  default = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  is_tree = shardings is not None and not isinstance(shardings, jax.sharding.Sharding)
  given = _named(shardings) if is_tree else dict.fromkeys(wanted, shardings)
  abstract = {}
  for old, new in new_names.items():
    sharding = given[new] or getattr(wanted[new], 'sharding', None)
    if not isinstance(sharding, jax.sharding.Sharding):  # Orbax's metadata has a description of the one it was saved with
      sharding = default
    abstract[old] = jax.ShapeDtypeStruct(stored[old].shape, wanted[new].dtype, sharding=sharding)
  loaded = _named(_read(path, {'params': _nested(abstract)})['params'])
  params = {new: loaded[old] for old, new in new_names.items()}
  if into is None:
    return _nested(params)
  return jax.tree.unflatten(jax.tree.structure(into), [params[name] for name in wanted])
