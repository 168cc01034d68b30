"""The base of a delta: which checkpoint it is, by the digests of its weights, and where it lies now."""

import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from etils import epath

from t5x_cpm import stored
from t5x_cpm.checkpoints import arrays, digests, run_directory
from t5x_cpm.checkpoints.run_directory import CheckpointError
from t5x_cpm.config import DeltaConfig
from t5x_cpm.models.leaf import Leaf

PREFIX = 'params/'


class Base(NamedTuple):
  """The checkpoint that a delta is trained on.

  Attributes:
    model_dir: of its run.
    step: of the checkpoint.
    fingerprint: of its stored weights, whatever mesh or type they are loaded on.
  """

  model_dir: epath.Path
  step: int
  fingerprint: str


def fingerprint(model_dir: Any, step: int) -> str:
  """The digest of the digests of a checkpoint's parameters. Those of a checkpoint that has none are computed."""
  model_dir = run_directory.resolve(model_dir)
  meta = run_directory.read_meta(model_dir, step)
  known = meta.get('arrays')
  if known is None:
    params = arrays.load_params(model_dir, step=step)
    known = digests.of_tree({'params': params})
  return stored.digest({name: text for name, text in known.items() if name.startswith(PREFIX)})


def find(model_dir: Any, wanted: str | None = None, *, allow_other: bool = False, vocabulary: str | None = None) -> Base:
  """The base in a model_dir: its newest checkpoint, or the newest one with a fingerprint.

  Args:
    model_dir: of the run of the base.
    wanted: the fingerprint; None: any.
    allow_other: whether the newest checkpoint is taken where none has the fingerprint, which is then told on stderr.
    vocabulary: the fingerprint of the vocabulary of the delta, which such a base must have, too; None: any.

  Raises:
    CheckpointError: there is none; or the run is a delta itself.
  """
  model_dir = run_directory.resolve(model_dir)
  run = run_directory.read_run(model_dir)
  run_directory.check_is_model(model_dir, run.config)
  newest = Base(model_dir, run.step, fingerprint(model_dir, run.step))
  if wanted in (None, newest.fingerprint):
    return newest
  for step in reversed(run.steps[:-1]):
    if fingerprint(model_dir, step) == wanted:
      return Base(model_dir, step, wanted)
  if allow_other:
    theirs = run.info.get('vocabulary')
    if None not in (vocabulary, theirs) and vocabulary != theirs:
      raise CheckpointError(f'--base={model_dir}: that run has another vocabulary ({theirs}) than the delta was trained with '
                            f'({vocabulary}), which --allow_other_base does not allow.')
    if jax.process_index() == 0:
      print(f'warning: the delta was trained on a base with the fingerprint {wanted}, and --base={model_dir} has '
            f'{newest.fingerprint} at step {run.step}: it is used all the same, as --allow_other_base says.', file=sys.stderr,
            flush=True)
    return newest
  others = ', those of other steps have others' if len(run.steps) > 1 else ''
  raise CheckpointError(
      f'--base={model_dir}: the delta was trained on a base with the fingerprint {wanted}; the weights of step {run.step} '
      f'there have {newest.fingerprint}{others}. Give the base that it was trained on; '
      '--allow_other_base takes this one.')


def held(leaves: Any, config: DeltaConfig) -> Any:
  """Shapes of parameters, from their leaves: of a base in the type that a delta run holds it in, but routers keep theirs."""
  def shape(leaf: Leaf) -> jax.ShapeDtypeStruct:
    is_base = config.frozen and leaf.casts and not leaf.name.startswith('delta/')
    return jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(config.base_dtype if is_base else leaf.dtype))

  return jax.tree.map(shape, leaves)


def load(base: Base, into: Any) -> Any:
  """The weights of a base, with the shapes, types and shardings of `into`."""
  return arrays.load_params(base.model_dir, step=base.step, into=into)


def load_whole(model_dir: Any, step: int, config: DeltaConfig, into: Any) -> Any:
  """The parameters of a checkpoint, together with those of its base where it holds a delta alone.

  Args:
    model_dir, step: say which checkpoint.
    config: `base` says where the base lies now.
    into: shapes, types and shardings of all parameters.
  """
  if not config.frozen:
    return arrays.load_params(model_dir, step=step, into=into)
  info = run_directory.read_run(model_dir, step).info
  base = find(config.base, info['base'], allow_other=config.allow_other_base, vocabulary=info['vocabulary'])
  delta = arrays.load_params(model_dir, step=step, into={'delta': into['delta']})
  return load(base, {name: tree for name, tree in into.items() if name != 'delta'}) | delta
