"""Learning-rate schedules and optimizers, as one optax transformation whose state can be sharded like the parameters."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from t5x_cpm.config import ConfigError, OptimizerConfig
from t5x_cpm.mesh import is_names

STACK_AXES = ('layers', 'expert')  # logical axes over which Adafactor's statistics are separate
MIN_FACTORED_SIZE = 128  # T5 keeps the full second moment of a matrix with a smaller dimension
# T5's Adafactor: added to squared gradients, and the least RMS of a parameter that scales its update.
SQUARE_EPSILON, SCALE_EPSILON = 1e-30, 1e-3

Schedule = Callable[[Any], jax.Array]
Keep = Callable[[Any, Any], Any]  # (old state, new state) -> the old one where a run has halted, else the new


def make_schedule(config: OptimizerConfig, steps: int) -> Schedule:
  """The learning rate of each update.

  With t = step + 1 (the number of the update, from 1), w = warmup_steps, d = decay_steps (of the run if 0), and
  p = (step - w) / (d - w) clipped to [0, 1]:

    noam                 learning_rate / sqrt(w) * t / w  up to t = w, then learning_rate / sqrt(t) (the released CPM-2 code)
    inverse_square_root  learning_rate / sqrt(max(t, w)): flat, then falling (T5)
    cosine               learning_rate * (f + (1 - f) * (1 + cos(pi p)) / 2), f = final_scale, after a linear warmup
    linear               learning_rate * (1 - (1 - f) * p), likewise
    constant             learning_rate, likewise

  So learning_rate is the peak of the last three, and the peak of the first two is learning_rate / sqrt(w): CPM-2's 0.001
  with 10,000 steps of warmup peaks at 1e-5. A linear warmup is t / w: the first update already has a rate above 0.

  Args:
    config: names the schedule.
    steps: length of the run (TrainConfig.steps).

  Returns:
    A function of the number of updates already done (an int or an array) to a float32 scalar.

  Raises:
    ConfigError: warmup is not shorter than the decay.
  """
  w, rate, name = config.warmup_steps, config.learning_rate, config.schedule
  decay = config.decay_steps or steps
  if name in ('cosine', 'linear') and 0 < decay <= w:
    raise ConfigError(
        f'OptimizerConfig.warmup_steps = {w}, but the {name} schedule ends at step {decay}: expected a shorter warmup, or '
        'a larger OptimizerConfig.decay_steps (0 is TrainConfig.steps).')

  def schedule(step: Any) -> jax.Array:
    t = jnp.asarray(step, jnp.float32) + 1.0
    warmup = jnp.minimum(t / max(w, 1), 1.0)
    if name in ('noam', 'inverse_square_root'):
      value = rate * jax.lax.rsqrt(jnp.maximum(t, max(w, 1)))
      return value * warmup if name == 'noam' else value
    if name == 'constant':
      return rate * warmup
    p = jnp.clip((t - 1.0 - w) / max(decay - w, 1), 0.0, 1.0)
    fall = 0.5 * (1.0 + jnp.cos(jnp.pi * p)) if name == 'cosine' else 1.0 - p
    return rate * warmup * (config.final_scale + (1.0 - config.final_scale) * fall)

  return schedule


def decays(path: str) -> bool:
  """Whether weight decay applies to the parameter of this path: not to norms and tables of relative positions."""
  names = path.split('/')
  return names[-1] != 'scale' and 'relative_bias' not in names


def _second_moment(parameter: jax.Array, names: tuple[str | None, ...]) -> dict[str, jax.Array]:
  """Zero statistics of one parameter of one layer. What has an axis without a name, routers and tables, is not factored."""
  shape = parameter.shape
  if len(shape) >= 2 and all(names[-2:]) and min(shape[-2:]) >= MIN_FACTORED_SIZE:
    return {'row': jnp.zeros(shape[:-1], parameter.dtype), 'col': jnp.zeros(shape[:-2] + shape[-1:], parameter.dtype)}
  return {'full': jnp.zeros(shape, parameter.dtype)}


def _rms(x: jax.Array) -> jax.Array:
  return jnp.sqrt(jnp.mean(jnp.square(x)))


def scale_by_adam(b1: float, b2: float, epsilon: float) -> optax.GradientTransformationExtraArgs:
  """optax.scale_by_adam, but that the update is made of the moments that `keep` leaves.

  Of moments kept after that, XLA:CPU copies both, as the update still needs the old ones: Adam then takes twice as long.
  """

  def update(updates: Any, state: Any, params: Any = None, *, keep: Keep) -> tuple[Any, Any]:
    del params
    count = optax.safe_increment(state.count)
    mu = keep(state.mu, optax.tree.update_moment(updates, state.mu, b1, 1))
    nu = keep(state.nu, optax.tree.update_moment_per_elem_norm(updates, state.nu, b2, 2))
    corrected = (optax.tree.bias_correction(moment, b, count) for moment, b in ((mu, b1), (nu, b2)))
    updates = jax.tree.map(lambda m, n: m / (jnp.sqrt(n) + epsilon), *corrected)
    return updates, optax.ScaleByAdamState(keep(state.count, count), mu, nu)

  return optax.GradientTransformationExtraArgs(optax.scale_by_adam().init, update)


def _kept(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
  """`tx` with its state as `keep` leaves it."""

  def update(updates: Any, state: Any, params: Any = None, *, keep: Keep) -> tuple[Any, Any]:
    updates, new = tx.update(updates, state, params)
    return updates, keep(state, new)

  return optax.GradientTransformationExtraArgs(tx.init, update)


def scale_by_adafactor(
    logical_axes: Any, *, decay_exponent: float, clip_threshold: float, parameter_scale: bool) -> optax.GradientTransformation:
  """Adafactor without momentum, as T5 uses it (Shazeer and Stern 2018), with separate statistics for every layer and expert.

  optax.adafactor gives the same for a tree of one layer. On a stack [L, ...] it would share the clipping and the scale
  between layers, and factor a stack of norm scales [L, D] across them.

  Args:
    logical_axes: tree of tuples of axis names, like the parameters; layers and experts lead.
    decay_exponent: the second moment of update t decays by 1 - t ** -decay_exponent.
    clip_threshold: greatest RMS of an update before scaling; 0 is no clipping.
    parameter_scale: multiply the update by the RMS of the parameter.

  Returns:
    A transformation with the state {'count', 'statistics'}: for each parameter {'row', 'col'}, running means of its squared
    gradients over the last and the last but one axis, or {'full'}, not averaged.
  """

  def over_stack(fn: Callable[..., Any], names: tuple[str | None, ...]) -> Callable[..., Any]:
    for name in names:
      fn = jax.vmap(fn) if name in STACK_AXES else fn
    return fn

  def one(gradient: jax.Array, moment: dict[str, jax.Array], parameter: jax.Array, decay: jax.Array) -> Any:
    square, decay = jnp.square(gradient), decay.astype(gradient.dtype)
    if 'full' in moment:
      full = decay * moment['full'] + (1 - decay) * (square + SQUARE_EPSILON)
      moment, update = {'full': full}, gradient * jax.lax.rsqrt(full)
    else:
      row = decay * moment['row'] + (1 - decay) * (jnp.mean(square, axis=-1) + SQUARE_EPSILON)
      col = decay * moment['col'] + (1 - decay) * (jnp.mean(square, axis=-2) + SQUARE_EPSILON)
      row_factor = jax.lax.rsqrt(row / jnp.mean(row, axis=-1, keepdims=True))
      moment = {'row': row, 'col': col}
      update = gradient * row_factor[..., :, None] * jax.lax.rsqrt(col)[..., None, :]
    factor = jnp.maximum(_rms(parameter), SCALE_EPSILON) if parameter_scale else 1.0
    if clip_threshold:
      factor = factor / jnp.maximum(1.0, _rms(update) / clip_threshold)
    return update * factor, moment

  def init(params: Any) -> dict[str, Any]:
    statistics = jax.tree.map(lambda p, names: over_stack(lambda p: _second_moment(p, names), names)(p), params, logical_axes)
    return {'count': jnp.zeros((), jnp.int32), 'statistics': statistics}

  def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, dict[str, Any]]:
    count = state['count'] + 1
    decay = 1.0 - count.astype(jnp.float32) ** -decay_exponent

    def leaf(gradient: jax.Array, names: tuple[str | None, ...], moment: Any, parameter: jax.Array) -> Any:
      return over_stack(lambda g, m, p: one(g, m, p, decay), names)(gradient, moment, parameter)

    both = jax.tree.map(leaf, updates, logical_axes, state['statistics'], params)
    statistics = jax.tree.map(lambda _, pair: pair[1], updates, both)
    return jax.tree.map(lambda _, pair: pair[0], updates, both), {'count': count, 'statistics': statistics}

  return optax.GradientTransformation(init, update)


def _wide(tree: Any) -> Any:
  """At least float32: in bfloat16, 0.999 * v + 0.001 * g^2 would leave v unchanged."""
  return jax.tree.map(lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)), tree)


def weight_decays(config: OptimizerConfig, abstract_params: Any) -> Any:
  """The weight decay of each parameter."""
  return jax.tree_util.tree_map_with_path(
      lambda path, _: config.weight_decay if decays('/'.join(_names(path))) else 0.0, abstract_params)


def make(
    config: OptimizerConfig, steps: int, logical_axes: Any, abstract_params: Any) -> optax.GradientTransformationExtraArgs:
  """The optimizer of a run: clip by the global norm, precondition, decay weights, multiply by the learning rate.

  Weight decay is decoupled: the decay of a step is learning rate * weight_decay * parameter, for every optimizer.
  Statistics and updates are at least float32, whatever the parameters are.

  Args:
    config: names the optimizer and its schedule.
    steps: length of the run, for schedules that end with it.
    logical_axes: tree of tuples of axis names, like the parameters.
    abstract_params: tree of shapes, of trained parameters only.

  Returns:
    A transformation whose state is {'count': updates done, 'inner': of the named optimizer}. Its update takes `halted`: where
    that is true the state stays as it was and the updates mean nothing. A caller that gives it a part of the gradients says so
    with `norm`, that of all, and `decay`, of this part.

  Raises:
    ConfigError: see `make_schedule`.
  """
  schedule = make_schedule(config, steps)
  if config.name == 'adamw':
    inner = scale_by_adam(config.beta1, config.beta2, config.epsilon)
  elif config.name == 'adafactor':
    inner = _kept(scale_by_adafactor(
        logical_axes, decay_exponent=config.adafactor_decay_exponent, clip_threshold=config.adafactor_clip_threshold,
        parameter_scale=config.adafactor_parameter_scale))
  elif config.momentum:
    inner = _kept(optax.trace(config.momentum))
  else:
    inner = _kept(optax.GradientTransformation(lambda params: {}, lambda updates, state, params=None: (updates, state)))
  all_decays = weight_decays(config, abstract_params)

  def init(params: Any) -> dict[str, Any]:
    return {'count': jnp.zeros((), jnp.int32), 'inner': inner.init(_wide(params))}

  def update(updates: Any, state: Any, params: Any = None, *, norm: Any = None, decay: Any = all_decays,
             halted: Any = None) -> tuple[Any, Any]:
    def keep(old: Any, new: Any) -> Any:
      return new if halted is None else jax.tree.map(lambda a, b: jnp.where(halted, a, b), old, new)

    updates, params = _wide(updates), _wide(params)
    if config.clip_norm:
      # optax.clip_by_global_norm divides every element, which XLA does in a pass of its own: on CPU, longer than Adam takes.
      factor = jnp.minimum(1.0, config.clip_norm / (optax.tree.norm(updates) if norm is None else norm))
      updates = jax.tree.map(lambda g: g * factor.astype(g.dtype), updates)
    updates, inner_state = inner.update(updates, state['inner'], params, keep=keep)
    rate = schedule(state['count'])

    def descend(update: jax.Array, decay: float, parameter: jax.Array) -> jax.Array:
      return -rate.astype(update.dtype) * (update + decay * parameter if decay else update)

    updates = jax.tree.map(descend, updates, decay, params)
    return updates, {'count': keep(state['count'], state['count'] + 1), 'inner': inner_state}

  return optax.GradientTransformationExtraArgs(init, update)


def state_axes(tx: optax.GradientTransformation, abstract_params: Any, logical_axes: Any) -> Any:
  """The logical axes of an optimizer's state: a tree like that of tx.init, of tuples of axis names.

  Without shardings made from these, jax.jit(tx.init) would put every moment on one device.

  Args:
    tx: from `make`.
    abstract_params: tree of shapes.
    logical_axes: tree of tuples of axis names, like the parameters.
  """
  leaves = jax.tree_util.tree_leaves_with_path(logical_axes, is_leaf=is_names)
  axes_of = {_names(path): axes for path, axes in leaves}

  def find(path: tuple[str, ...], ndim: int) -> tuple[str | None, ...]:
    for start in range(len(path)):
      if path[start:] in axes_of:
        return axes_of[path[start:]]
      if path[start:-1] in axes_of:  # of Adafactor
        axes = axes_of[path[start:-1]]
        return {'row': axes[:-1], 'col': axes[:-2] + axes[-1:], 'full': axes}[path[-1]]
    if ndim:
      raise ValueError(f'the optimizer state {"/".join(path)} belongs to no parameter, so its sharding is not known')
    return ()

  return jax.tree_util.tree_map_with_path(
      lambda path, leaf: find(_names(path), leaf.ndim), jax.eval_shape(tx.init, abstract_params))


def _names(path: tuple[Any, ...]) -> tuple[str, ...]:
  return tuple(jax.tree_util.keystr((key,), simple=True) for key in path)
