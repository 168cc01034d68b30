"""Sends tokens to the experts that their router chose, and brings their weighted outputs back.

There are two ways. `einsum` gives every expert a fixed number of places in a group; a token that finds no place is left behind
and passes the layer unchanged (Lepikhin et al. 2021). `dropless` sorts the tokens by expert and multiplies each run of them by
the matrices of its expert; over the expert axis of a mesh, tokens travel by all-to-all (Gale et al. 2022). Outside training
nothing is left behind, whichever way is configured.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from t5x_cpm import mesh as mesh_lib
from t5x_cpm.mesh import shard
from t5x_cpm.models.grouped import grouped_dot
from t5x_cpm.models.hooks import InExperts, Product
from t5x_cpm.models.layers import MLP, MLP_AXES, dropout, scramble
from t5x_cpm.models.routing import Routing

MODEL, EXPERT = mesh_lib.RULES['mlp'], mesh_lib.RULES['expert']  # the mesh axes that split the experts' weights


def changed(product: Product, delta: InExperts | None) -> Callable[[str, jax.Array, jax.Array], jax.Array]:
  """The products of experts by the names of their matrices, with what a delta does in them."""
  if delta is None:
    return lambda name, x, kernel: product(x, kernel)
  return lambda name, x, kernel: delta.change(name, x, product(x, kernel), product)


def rows_together(rows: int, length: int, group_size: int) -> tuple[int, int]:
  """How rows are divided into groups: (rows in a group, groups in a row). One of the two is 1."""
  if length <= group_size:
    return min(1 << (group_size // length).bit_length() - 1, rows & -rows), 1  # a power of two that divides the batch
  groups = next(groups for groups in range(-(-length // group_size), length + 1) if length % groups == 0)
  return 1, groups


def to_groups(x_BL: jax.Array, group_size: int) -> jax.Array:
  """[B, L, ...] -> [G, T, ...]."""
  B, L = x_BL.shape[:2]
  rows, groups = rows_together(B, L, group_size)
  return x_BL.reshape(B // rows * groups, rows * L // groups, *x_BL.shape[2:])


# Einsum within a capacity.


def places_of(routing: Routing) -> tuple[jax.Array, jax.Array]:
  """The place of each choice in its expert, and whether the expert has room for it: [G, T, K] each.

  First choices take their places before second choices. Among equals the priority decides, or else the order of the text.
  """
  G, T, K = routing.expert_GTK.shape
  expert_GTK = routing.expert_GTK
  order_GT = None
  if routing.priority_GT is not None:
    order_GT = jnp.argsort(-routing.priority_GT, axis=-1)
    expert_GTK = jnp.take_along_axis(expert_GTK, order_GT[..., None], axis=1)
  hot_GNE = jax.nn.one_hot(jnp.moveaxis(expert_GTK, 2, 1).reshape(G, K * T), routing.num_experts, dtype=jnp.int32)
  before_GNE = jnp.cumsum(hot_GNE, axis=1) - hot_GNE
  place_GTK = jnp.moveaxis(jnp.sum(before_GNE * hot_GNE, axis=-1).reshape(G, K, T), 1, 2)
  if order_GT is not None:
    place_GTK = jnp.take_along_axis(place_GTK, jnp.argsort(order_GT, axis=-1)[..., None], axis=1)
  assert routing.capacity is not None
  return place_GTK, (place_GTK < routing.capacity) & (routing.expert_GTK < routing.num_experts)


def _each_expert(x_EGCI: jax.Array, kernel_EIO: jax.Array) -> jax.Array:
  E, G, C, I = x_EGCI.shape
  y = jnp.einsum('ENI,EIO->ENO', x_EGCI.reshape(E, G * C, I), kernel_EIO.astype(x_EGCI.dtype))
  return y.reshape(E, G, C, -1)


def einsum(
    mlp: MLP, u_GTD: jax.Array, routing: Routing, rate: float, key: jax.Array | None,
    delta: InExperts | None = None) -> jax.Array:
  """The sum of the experts' weighted outputs for each token [G, T, D]; 0 for a token that finds no place."""
  assert routing.capacity is not None
  E, C, dtype = routing.num_experts, routing.capacity, u_GTD.dtype
  place_GTK, placed_GTK = places_of(routing)
  to_E = jax.nn.one_hot(jnp.where(placed_GTK, routing.expert_GTK, E), E, dtype=dtype)
  to_C = jax.nn.one_hot(place_GTK, C, dtype=dtype)
  sent_GTEC = jnp.einsum('GTKE,GTKC->GTEC', to_E, to_C)
  x_EGCD = shard(jnp.einsum('GTEC,GTD->EGCD', sent_GTEC, u_GTD), 'expert', 'batch', None, 'embed')
  y_EGCD = mlp(x_EGCD, lambda hidden: dropout(hidden, rate, key), changed(_each_expert, delta))
  weighted_GTEC = jnp.einsum('GTKE,GTKC->GTEC', to_E * routing.weight_GTK[..., None].astype(dtype), to_C)
  return jnp.einsum('GTEC,EGCD->GTD', weighted_GTEC, shard(y_EGCD, 'expert', 'batch', None, 'embed'))


# Dropless.


@jax.custom_vjp
def _permute(x_AD: jax.Array, order_A: jax.Array, inverse_A: jax.Array) -> jax.Array:
  """x[order], with a gradient that gathers by the inverse order; JAX's own would scatter."""
  del inverse_A
  return x_AD[order_A]


_permute.defvjp(
    lambda x, order, inverse: (x[order], (order, inverse)),
    lambda orders, dy: (dy[orders[1]], None, None))


def _inverse(order_A: jax.Array) -> jax.Array:
  return jnp.zeros_like(order_A).at[order_A].set(jnp.arange(order_A.shape[0], dtype=order_A.dtype), unique_indices=True)


def sort_by_expert(expert_A: jax.Array, num_experts: int) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Sorts rows by expert, with those that go nowhere last: the order [A], its inverse [A], and the rows per expert [E]."""
  order_A = jnp.argsort(expert_A, stable=True)
  return order_A, _inverse(order_A), jnp.bincount(expert_A, length=num_experts + 1)[:num_experts]


def _dropout_by_row(x_AF: jax.Array, rate: float, seed_A: jax.Array) -> jax.Array:
  """Dropout from a seed for each row, so that a token loses the same numbers whichever device computes it."""
  if rate == 0.0:
    return x_AF
  column_F = jnp.arange(x_AF.shape[1], dtype=jnp.uint32)
  if MODEL in jax.sharding.get_abstract_mesh().manual_axes:  # this device holds some of the columns
    column_F += jax.lax.axis_index(MODEL).astype(jnp.uint32) * np.uint32(x_AF.shape[1])
  keep = scramble(seed_A[:, None] ^ scramble(column_F)) >= np.uint32(rate * 2**32)
  return jnp.where(keep, x_AF / (1.0 - rate), jnp.zeros_like(x_AF))


def _by_expert(
    mlp: MLP, x_AD: jax.Array, expert_A: jax.Array, seed_A: jax.Array, num_experts: int, rate: float,
    delta: InExperts | None) -> jax.Array:
  """Puts row a through expert expert_A[a]. What comes out for a row that goes nowhere has no meaning."""
  order_A, inverse_A, counts_E = sort_by_expert(expert_A, num_experts)

  def drop(hidden_AF: jax.Array) -> jax.Array:
    return _dropout_by_row(hidden_AF, rate, seed_A[order_A])

  def product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return grouped_dot(x, kernel.astype(x.dtype), counts_E)

  return _permute(mlp(_permute(x_AD, order_A, inverse_A), drop, changed(product, delta)), inverse_A, order_A)


def weighted(y_NKD: jax.Array, expert_NK: jax.Array, weight_NK: jax.Array, num_experts: int) -> jax.Array:
  """The sum of the outputs of each token's choices, by their weights; those that are no expert count nothing."""
  goes_NK = expert_NK < num_experts
  y_NKD = jnp.where(goes_NK[..., None], y_NKD, 0)
  return jnp.sum(y_NKD * jnp.where(goes_NK, weight_NK, 0)[..., None].astype(y_NKD.dtype), axis=1)


def _local(mlp: MLP, u_ND: jax.Array, expert_NK: jax.Array, weight_NK: jax.Array, seed_NK: jax.Array, *, num_experts: int,
           rate: float, shards: int, delta: InExperts | None) -> jax.Array:
  """Computes the tokens of one device. The mesh axis `expert` has `shards` devices, which hold equally many experts."""
  K, D = expert_NK.shape[1], u_ND.shape[1]
  x_AD, expert_A, seed_A = jnp.repeat(u_ND, K, axis=0), expert_NK.reshape(-1), seed_NK.reshape(-1)
  if shards == 1:
    y_AD = _by_expert(mlp, x_AD, expert_A, seed_A, num_experts, rate, delta)
  else:
    # A device has room for every choice of every other device, because how many will come is not known at compile time.
    A, mine = expert_A.shape[0], num_experts // shards
    owner_A = expert_A // mine  # a row that goes nowhere has the owner `shards`
    hot_AP = jax.nn.one_hot(owner_A, shards, dtype=jnp.int32)
    rank_A = jnp.sum((jnp.cumsum(hot_AP, axis=0) - hot_AP) * hot_AP, axis=1)
    nowhere_A = shards * A + jnp.arange(A)
    slot_A = jnp.where(owner_A < shards, owner_A * A + rank_A, nowhere_A)

    def exchange(x_S: jax.Array) -> jax.Array:
      return jax.lax.all_to_all(x_S, EXPERT, split_axis=0, concat_axis=0, tiled=True)

    def send(x_A: jax.Array, empty: Any) -> jax.Array:
      room_S = jnp.full((shards * A, *x_A.shape[1:]), empty, x_A.dtype)
      return exchange(room_S.at[slot_A].set(x_A, mode='drop', unique_indices=True))

    y_SD = _by_expert(mlp, send(x_AD, 0), send(expert_A % mine, mine), send(seed_A, 0), mine, rate, delta)
    y_AD = exchange(y_SD).at[slot_A].get(mode='fill', fill_value=0)
  return weighted(y_AD.reshape(-1, K, D), expert_NK, weight_NK, num_experts)


def dropless(mlp: MLP, u_GTD: jax.Array, routing: Routing, rate: float, key: jax.Array | None,
             delta: InExperts | None = None, delta_axes: Any = None) -> jax.Array:
  """The sum of the experts' weighted outputs for each token [G, T, D]; arguments as in `dispatch`."""
  K, D, num_experts = routing.expert_GTK.shape[-1], u_GTD.shape[-1], routing.num_experts
  expert_NK, weight_NK = routing.expert_GTK.reshape(-1, K), routing.weight_GTK.reshape(-1, K)
  if key is None:
    rate, seed_NK = 0.0, jnp.zeros(expert_NK.shape, jnp.uint32)
  else:
    seed_NK = jax.random.bits(key, expert_NK.shape, jnp.uint32)
  tokens = u_GTD.reshape(-1, D), expert_NK, weight_NK, seed_NK
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1:
    return _local(mlp, *tokens, num_experts=num_experts, rate=rate, shards=1, delta=delta).reshape(u_GTD.shape)

  graph, state = nnx.split(mlp)
  leaves = nnx.to_pure_dict(state)
  kernels = {name: mesh_lib.spec(('expert', *MLP_AXES[name])) for name in leaves}
  rows = mesh_lib.spec(('batch', None))
  shards = mesh.shape[EXPERT]

  changes = None if delta is None else jax.tree.map(
      lambda leaf, axes: mesh_lib.spec(axes), delta, dataclasses.replace(delta, weights=delta_axes))

  def local(leaves: Any, delta: InExperts | None, *tokens: jax.Array) -> jax.Array:
    mlp = nnx.merge(graph, leaves)
    return jax.lax.psum(_local(mlp, *tokens, num_experts=num_experts, rate=rate, shards=shards, delta=delta), MODEL)

  y_ND = jax.shard_map(
      local, mesh=mesh, in_specs=(kernels, changes, rows, rows, rows, rows), out_specs=rows,
      check_vma=False)(leaves, delta, *tokens)
  return y_ND.reshape(u_GTD.shape)


# What a layer calls.


def dispatch(mlp: MLP, u_GTD: jax.Array, routing: Routing, rate: float, key: jax.Array | None,
             delta: InExperts | None = None, delta_axes: Any = None) -> jax.Array:
  """The sum of the weighted outputs of the experts that each token goes to [G, T, D].

  Args:
    mlp: the experts, with weights [E, ...].
    u_GTD: the tokens, in groups.
    routing: where they go.
    rate, key: of the dropout of hidden activations; without a key nothing is dropped.
    delta: what acts in the experts' matrices.
    delta_axes: the logical axes of its weights, a tree like theirs.
  """
  if routing.capacity is None:
    return dropless(mlp, u_GTD, routing, rate, key, delta, delta_axes)
  return einsum(mlp, u_GTD, routing, rate, key, delta)


def left_behind(routing: Routing, valid_GT: jax.Array) -> tuple[jax.Array, jax.Array]:
  """The number of valid tokens that no expert takes, and the number of valid tokens."""
  served_GT = (routing.expert_GTK < routing.num_experts).any(axis=-1)
  if routing.capacity is not None:
    served_GT = places_of(routing)[1].any(axis=-1)
  valid_GT = valid_GT.reshape(served_GT.shape)
  return (valid_GT & ~served_GT).sum().astype(jnp.float32), jnp.maximum(valid_GT.sum(), 1).astype(jnp.float32)
