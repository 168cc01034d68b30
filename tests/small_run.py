"""A run with a few small arrays, saved in no time, for the tests of checkpoints."""

import contextlib
import os
import pathlib
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_cpm.checkpoints.manager import Manager
from t5x_cpm.checkpoints.run_directory import read_run
from t5x_cpm.config import CheckpointConfig, Config

ROOT = pathlib.Path(__file__).resolve().parent.parent
INFO = {'vocabulary': 'f00d', 'data': {'rates': {'zh': 1.0, 'en': 2.0}, 'cache': 'abc'}}


def small_state(seed=0, size=4):
  rng = np.random.default_rng(seed)

  def draw(*shape, dtype=jnp.float32):
    return jnp.asarray(rng.standard_normal(shape), dtype)

  params = {
      'token_embedder': {'embedding': draw(7, size)},
      'encoder': {'layers': {'attention': {'query': draw(3, size, size)}, 'mlp_norm': {'scale': draw(3, size)}}},
      'experts': {'encoder': {'wi_0': draw(3, 2, size, size), 'wo': draw(3, size, size)}},
      'lm_head': draw(size, 7, dtype=jnp.bfloat16)}
  opt_state = {'count': jnp.int32(seed), 'inner': {'mu': jax.tree.map(lambda x: x * 0.5, params)}}
  return {'step': jnp.int32(seed), 'params': params, 'opt_state': opt_state, 'extra': {}, 'halted': jnp.bool(False)}


def axes_of(state):
  """Logical axes of a state: what stands under `layers` or `experts` is a stack of layers, and wi_0 one of experts as well."""

  def names(path, leaf):
    words = jax.tree_util.keystr(path, simple=True, separator='/').split('/')
    stack = (('layers',) if {'layers', 'experts'} & set(words) else ()) + (('expert',) if words[-1] == 'wi_0' else ())
    return (*stack, *(None,) * (leaf.ndim - len(stack)))

  return jax.tree_util.tree_map_with_path(names, state)


def abstract(tree):
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def assert_same(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    assert x.dtype == y.dtype
    assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def config(**fields):
  return Config(checkpoint=CheckpointConfig(**fields))


def saved(model_dir, steps=(1,), cfg=None, metrics=None):
  with Manager(model_dir, cfg or config(), info=INFO) as manager:
    for step in steps:
      manager.save(step, small_state(step), (metrics or {}).get(step), axes=axes_of(small_state(step)))
  return read_run(model_dir).steps


@contextlib.contextmanager
def tmpfs(path, options):
  if os.geteuid() != 0:
    pytest.skip('mounting a tmpfs needs root')
  path.mkdir()
  if subprocess.run(['mount', '-t', 'tmpfs', '-o', options, 'tmpfs', str(path)], capture_output=True).returncode:
    pytest.skip('this machine does not let its root mount a tmpfs')
  try:
    yield path
  finally:
    subprocess.run(['umount', '-l', str(path)], check=True)


def python(code, *arguments, **environment):
  return subprocess.run(
      [sys.executable, '-c', textwrap.dedent(code), *map(str, arguments)], cwd=ROOT, text=True, capture_output=True,
      env=os.environ | {'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': str(ROOT)} | environment, timeout=400)
