"""Learning-rate schedules, and optimizers that know the logical axes of their state, so that it is sharded like parameters."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from t5x_cpm.config import ConfigError, OptimizerConfig
from t5x_cpm.models.leaf import Leaf

MIN_FACTORED_SIZE = 128  # T5 keeps the full second moment of a matrix with a smaller dimension
# T5's Adafactor: added to squared gradients, and the least RMS of a parameter that scales its update.
SQUARE_EPSILON, SCALE_EPSILON = 1e-30, 1e-3

Schedule = Callable[[Any], jax.Array]


class Optimizer(NamedTuple):
  """What optax calls a GradientTransformationExtraArgs, and the axes of its state.

  Attributes:
    init: params -> state.
    update: (gradients, state, params, *, halted) -> (updates to add to the parameters, state). Where `halted` is true the
      state stays as it was and the updates mean nothing; None: never halted. The update of `make` takes more arguments.
    axes: the logical axes of the state: a tree like that of `init`, of tuples of axis names. Without shardings made from
      these, jax.jit(init) would put every moment on one device.
  """

  init: Callable[[Any], Any]
  update: Callable[..., tuple[Any, Any]]
  axes: Any


def keep(halted: jax.Array | None, old: Any, new: Any) -> Any:
  """The tree `old` where a run has halted, else `new`; None: a run that never halts."""
  return new if halted is None else jax.tree.map(lambda a, b: a if a is b else jnp.where(halted, a, b), old, new)


def make_schedule(config: OptimizerConfig, steps: int) -> Schedule:
  """The learning rate of each update.

  With t = step + 1 (the number of the update, from 1), w = warmup_steps, d = decay_steps (or `steps` if 0), and
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


def _is_factored(leaf: Leaf) -> bool:
  """Whether Adafactor factors a parameter's second moment. An axis without a name, as in routers and tables, rules it out."""
  count = len(leaf.stacked)
  shape, names = leaf.shape[count:], leaf.axes[count:]
  return len(shape) >= 2 and all(names[-2:]) and min(shape[-2:]) >= MIN_FACTORED_SIZE


def _rms(x: jax.Array) -> jax.Array:
  return jnp.sqrt(jnp.mean(jnp.square(x)))


def scale_by_adam(axes: Any, b1: float, b2: float, epsilon: float) -> Optimizer:
  """optax.scale_by_adam, except that the update is made from the moments that `keep` returns.

  If `keep` came last, the update would still need the old moments, and XLA:CPU would copy both: Adam would take twice as long.

  Args:
    axes: tree of tuples of axis names, like the parameters.
    b1, b2: decay of the first and of the second moment.
    epsilon: added to the root of the second moment.
  """

  def update(updates: Any, state: Any, params: Any = None, *, halted: jax.Array | None = None) -> tuple[Any, Any]:
    del params
    count = optax.safe_increment(state.count)
    mu = keep(halted, state.mu, optax.tree.update_moment(updates, state.mu, b1, 1))
    nu = keep(halted, state.nu, optax.tree.update_moment_per_elem_norm(updates, state.nu, b2, 2))
    corrected = (optax.tree.bias_correction(moment, b, count) for moment, b in ((mu, b1), (nu, b2)))
    updates = jax.tree.map(lambda m, n: m / (jnp.sqrt(n) + epsilon), *corrected)
    return updates, optax.ScaleByAdamState(keep(halted, state.count, count), mu, nu)

  return Optimizer(optax.scale_by_adam().init, update, optax.ScaleByAdamState((), axes, axes))  # type: ignore[arg-type]


def trace(axes: Any, momentum: float) -> Optimizer:
  """optax.trace, or without momentum the gradients as they are."""
  tx: Any = optax.trace(momentum) if momentum else optax.GradientTransformation(
      lambda params: {}, lambda updates, state, params=None: (updates, state))

  def update(updates: Any, state: Any, params: Any = None, *, halted: jax.Array | None = None) -> tuple[Any, Any]:
    updates, new = tx.update(updates, state, params)
    return updates, keep(halted, state, new)

  return Optimizer(tx.init, update, optax.TraceState(axes) if momentum else {})


def _statistics(leaf: Leaf, whole: tuple[Any, ...], make: Callable[[Any], Any]) -> dict[str, Any]:
  """For each statistic of a parameter, make() of what it keeps of `whole`, which is the parameter's shape or its axes."""
  if _is_factored(leaf):
    return {'row': make(whole[:-1]), 'col': make(whole[:-2] + whole[-1:])}
  return {'full': make(whole)}


def _adafactor(gradient: jax.Array, statistics: dict[str, jax.Array], parameter: jax.Array, decay: jax.Array, *,
               clip_threshold: float, parameter_scale: bool) -> tuple[jax.Array, dict[str, jax.Array]]:
  """The update of one parameter of one layer, and its new statistics."""
  square, decay = jnp.square(gradient), decay.astype(gradient.dtype)
  if 'full' in statistics:
    full = decay * statistics['full'] + (1 - decay) * (square + SQUARE_EPSILON)
    statistics, update = {'full': full}, gradient * jax.lax.rsqrt(full)
  else:
    row = decay * statistics['row'] + (1 - decay) * (jnp.mean(square, axis=-1) + SQUARE_EPSILON)
    col = decay * statistics['col'] + (1 - decay) * (jnp.mean(square, axis=-2) + SQUARE_EPSILON)
    row_factor = jax.lax.rsqrt(row / jnp.mean(row, axis=-1, keepdims=True))
    statistics = {'row': row, 'col': col}
    update = gradient * row_factor[..., :, None] * jax.lax.rsqrt(col)[..., None, :]
  factor = jnp.maximum(_rms(parameter), SCALE_EPSILON) if parameter_scale else 1.0
  if clip_threshold:
    factor = factor / jnp.maximum(1.0, _rms(update) / clip_threshold)
  return update * factor, statistics


def scale_by_adafactor(leaves: Any, *, decay_exponent: float, clip_threshold: float, parameter_scale: bool) -> Optimizer:
  """Adafactor without momentum, as T5 uses it (Shazeer and Stern 2018), with separate statistics for every layer and expert.

  optax.adafactor gives the same for a tree of one layer. On a stack [L, ...] it would share the clipping and the scale
  between layers, and factor a stack of norm scales [L, D] across them.

  Args:
    leaves: tree of Leaf, like the parameters.
    decay_exponent: the second moment of update t decays by 1 - t ** -decay_exponent.
    clip_threshold: greatest RMS of an update before scaling; 0 is no clipping.
    parameter_scale: multiply the update by the RMS of the parameter.

  Returns:
    An optimizer with the state {'count', 'statistics'}: for each parameter {'row', 'col'}, running means of its squared
    gradients over the last and the last but one axis, or {'full'}, not averaged.
  """

  def init(params: Any) -> dict[str, Any]:
    statistics = jax.tree.map(
        lambda leaf, p: _statistics(leaf, leaf.shape, lambda shape: jnp.zeros(shape, p.dtype)), leaves, params)
    return {'count': jnp.zeros((), jnp.int32), 'statistics': statistics}

  def update(updates: Any, state: Any, params: Any = None, *, halted: jax.Array | None = None) -> tuple[Any, dict[str, Any]]:
    count = state['count'] + 1
    decay = 1.0 - count.astype(jnp.float32) ** -decay_exponent

    def every_layer(leaf: Leaf, gradient: jax.Array, statistics: Any, parameter: jax.Array) -> Any:
      def fn(g: Any, s: Any, p: Any) -> Any:
        return _adafactor(g, s, p, decay, clip_threshold=clip_threshold, parameter_scale=parameter_scale)

      for _ in leaf.stacked:
        fn = jax.vmap(fn)
      return fn(gradient, statistics, parameter)

    both = jax.tree.map(every_layer, leaves, updates, state['statistics'], params)
    new = {'count': count, 'statistics': jax.tree.map(lambda _, pair: pair[1], updates, both)}
    return jax.tree.map(lambda _, pair: pair[0], updates, both), keep(halted, state, new)

  axes = {'count': (), 'statistics': jax.tree.map(lambda leaf: _statistics(leaf, leaf.axes, tuple), leaves)}
  return Optimizer(init, update, axes)


def _wide(tree: Any) -> Any:
  """At least float32: in bfloat16, 0.999 * v + 0.001 * g^2 would leave v unchanged."""
  return jax.tree.map(lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)), tree)


def weight_decays(config: OptimizerConfig, leaves: Any) -> Any:
  """The weight decay of each parameter of a tree of Leaf."""
  return jax.tree.map(lambda leaf: config.weight_decay if leaf.decays else 0.0, leaves)


def make(config: OptimizerConfig, steps: int, leaves: Any) -> Optimizer:
  """The optimizer of a run: clip by the global norm, precondition, decay weights, multiply by the learning rate.

  Weight decay is decoupled: the decay of a step is learning rate * weight_decay * parameter, for every optimizer.
  Statistics and updates are at least float32, whatever the parameters are.

  Args:
    config: names the optimizer and its schedule.
    steps: length of the run, for schedules that end with it.
    leaves: tree of Leaf, of trained parameters only.

  Returns:
    An optimizer whose state is {'count': updates done, 'inner': of the named optimizer}. A caller that updates only some of the
    parameters also passes `norm`, the norm of all gradients, and `decay`, the weight decay of each of these parameters.

  Raises:
    ConfigError: see `make_schedule`.
  """
  schedule = make_schedule(config, steps)
  axes = jax.tree.map(lambda leaf: leaf.axes, leaves)
  if config.name == 'adamw':
    inner = scale_by_adam(axes, config.beta1, config.beta2, config.epsilon)
  elif config.name == 'adafactor':
    inner = scale_by_adafactor(
        leaves, decay_exponent=config.adafactor_decay_exponent, clip_threshold=config.adafactor_clip_threshold,
        parameter_scale=config.adafactor_parameter_scale)
  else:
    inner = trace(axes, config.momentum)
  all_decays = weight_decays(config, leaves)

  def init(params: Any) -> dict[str, Any]:
    return {'count': jnp.zeros((), jnp.int32), 'inner': inner.init(_wide(params))}

  def update(updates: Any, state: Any, params: Any = None, *, norm: Any = None, decay: Any = all_decays,
             halted: jax.Array | None = None) -> tuple[Any, Any]:
    updates, params = _wide(updates), _wide(params)
    if config.clip_norm:
      # optax.clip_by_global_norm divides every element, which XLA does in a pass of its own: on CPU, longer than Adam takes.
      factor = jnp.minimum(1.0, config.clip_norm / (optax.tree.norm(updates) if norm is None else norm))
      updates = jax.tree.map(lambda g: g * factor.astype(g.dtype), updates)
    updates, inner_state = inner.update(updates, state['inner'], params, halted=halted)
    rate = schedule(state['count'])

    def descend(update: jax.Array, decay: float, parameter: jax.Array) -> jax.Array:
      return -rate.astype(update.dtype) * (update + decay * parameter if decay else update)

    updates = jax.tree.map(descend, updates, decay, params)
    return updates, {'count': keep(halted, state['count'], state['count'] + 1), 'inner': inner_state}

  return Optimizer(init, update, {'count': (), 'inner': inner.axes})
