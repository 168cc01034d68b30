"""What a device has no room for: the optimizer's state, and then the weights of layers, in the memory of the hosts.

An update takes them through the device one parameter after the other, behind optimization barriers: all at once, as XLA would
order it, would need as much of the device's memory as was saved. Weights that are away leave a copy on the device, in the type
that computes: state['copies'], made anew by every update and never saved. Nothing of them moves where both types are the same.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from t5x_cpm import trees
from t5x_cpm.chips import GiB
from t5x_cpm.models.leaf import Leaf
from t5x_cpm.training.optimizer import Optimizer, keep

HOST = 'pinned_host'
# Logical axes of weights that compute in the compute dtype alone, once for each token: a gradient in it loses nothing.
KERNELS = {'heads', 'mlp'}


def _moved(abstract: Any, shardings: Any, gib: float) -> tuple[Any, float]:
  """Shardings that keep so many GiB of each device's share on its host, whole arrays, largest first; what is left of gib."""
  leaves, placed = jax.tree.leaves(abstract), jax.tree.leaves(shardings)
  sizes = [math.prod(s.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf, s in zip(leaves, placed, strict=True)]
  for index in sorted(range(len(leaves)), key=lambda index: -sizes[index]):
    if leaves[index].ndim and gib > 0:
      placed[index] = placed[index].with_memory_kind(HOST)
      gib -= sizes[index] / GiB
  return jax.tree.unflatten(jax.tree.structure(shardings), placed), gib


def _away(tree: Any, shardings: Any) -> Any:
  """The leaves of a tree like the parameters that lie in the memory of the hosts."""
  return trees.split(tree, shardings, lambda sharding: sharding.memory_kind == HOST)[0]


def move(abstract: Any, shardings: Any, leaves: Any, gib: float, dtype: Any) -> Any:
  """Shardings of a state of which each device keeps so much in the memory of its host: the optimizer's state goes first.

  Args:
    abstract: shapes and dtypes of the state.
    shardings: of the state.
    leaves: tree of Leaf, like the parameters of the state.
    gib: at least so many GiB are moved, or all that can be; -1 is all.
    dtype: that the model computes in.
  """
  def may_move(leaf: Leaf) -> bool:
    return 'layers' in leaf.stacked and bool(KERNELS & set(leaf.axes)) and jnp.dtype(leaf.dtype).itemsize > dtype.itemsize

  moments, left = _moved(abstract['opt_state'], shardings['opt_state'], math.inf if gib < 0 else gib)
  kernels = trees.split(abstract['params'], leaves, may_move)[0]
  here, rest = trees.split(shardings['params'], leaves, may_move)
  moved = shardings | {'opt_state': moments, 'params': trees.merged(_moved(kernels, here, left)[0], rest)}
  away = _away(moved['params'], moved['params'])
  return moved | ({'copies': jax.tree.map(lambda s: s.with_memory_kind('device'), away)} if away else {})


def is_away(x: Any) -> bool:
  """Whether an array lies in the memory of the hosts."""
  return isinstance(x, jax.Array) and x.sharding.memory_kind == HOST


def brought(x: Any) -> Any:
  """Outside jit: an array, on the devices."""
  return jax.device_put(x, x.sharding.with_memory_kind('device')) if is_away(x) else x


def _on_device(tree: Any, shardings: Any) -> Any:
  return jax.tree.map(
      lambda x, s: jax.device_put(x, s.with_memory_kind('device')) if s.memory_kind == HOST else x, tree, shardings)


def saved(state: Any) -> Any:
  """The state as a checkpoint holds it."""
  return {name: value for name, value in state.items() if name != 'copies'}


def complete(state: Any, shardings: Any, dtype: Any) -> Any:
  """The state with the copies of what is away; the inverse of `saved`."""
  if 'copies' not in shardings:
    return state

  def copies(away: Any) -> Any:  # all at once: weights and copies take less than gradients and copies do in a step
    here = _on_device(away, _away(shardings['params'], shardings['params']))
    return jax.tree.map(lambda x: x.astype(dtype), here)

  return state | {'copies': jax.jit(copies, out_shardings=shardings['copies'])(_away(state['params'], shardings['params']))}


def working(state: Any) -> Any:
  """The parameters to compute with, all on the devices. Works on shardings too."""
  return trees.merged(state['params'], state.get('copies', {}))


def update(tx: Optimizer, gradients: Any, state: Any, params: Any, shardings: Any, decay: Any, dtype: Any, *, norm: jax.Array,
           halted: jax.Array) -> tuple[Any, jax.Array]:
  """One update, of one parameter after the other.

  Args:
    tx: from `optimizer.make`; its update of one parameter depends on the others by the norm alone.
    gradients, params: of what is trained.
    state: of tx.
    shardings: {'params', 'opt_state'}, of params and state.
    decay: weight decay of each parameter.
    dtype: of copies.
    norm: of all gradients.
    halted: whether everything stays as it is.

  Returns:
    {'params', 'opt_state'} where they were, with 'copies' of the parameters that are away; and the sum of the squares of all.
  """
  leaves, structure = jax.tree.flatten(gradients)

  def is_one_each(node: Any) -> bool:
    return bool(jax.tree.structure(node) == structure)  # type: ignore[operator]

  def pick(tree: Any, index: int) -> Any:
    return jax.tree.map(lambda node: jax.tree.leaves(node)[index] if is_one_each(node) else node, tree, is_leaf=is_one_each)

  both = {'params': params, 'opt_state': state}
  results: list[Any] = []
  copies: list[Any] = []
  squares = jnp.zeros((), jnp.float32)
  for index, gradient in enumerate(leaves):
    own, where = pick(both, index), pick(shardings, index)
    if results:  # not before the last one is done
      own, gradient, _ = jax.lax.optimization_barrier((own, gradient, (results[-1], copies[-1], squares)))
    own = _on_device(own, where)
    change, new_state = tx.update(
        gradient, own['opt_state'], own['params'], decay=pick(decay, index), norm=norm, halted=halted)
    new = {'params': keep(halted, own['params'], optax.apply_updates(own['params'], change)), 'opt_state': new_state}
    squares += jnp.sum(jnp.square(new['params'].astype(squares.dtype)))
    copies.append(new['params'].astype(dtype) if where['params'].memory_kind == HOST else None)
    results.append(jax.tree.map(jax.device_put, new, where))
  merged = jax.tree.map(
      lambda node, *each: jax.tree.unflatten(structure, each) if is_one_each(node) else each[-1], both, *results,
      is_leaf=is_one_each)
  away = _away(jax.tree.unflatten(structure, copies), shardings['params'])
  return merged | ({'copies': away} if away else {}), squares
