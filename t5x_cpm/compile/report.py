"""A plan in words: what `compile` prints."""

import math

from t5x_cpm.chips import GiB
from t5x_cpm.compile.plan import Plan
from t5x_cpm.compile.slices import Slice
from t5x_cpm.config import Config


def _smaller(plan: Plan, config: Config) -> list[str]:
  """What makes a step smaller, most effective first."""
  lines = []
  if plan.step == 'train':
    if config.mesh.sharding != 'full':
      lines.append("MeshConfig.sharding = 'full' splits parameters and optimizer state over all chips of `data` and `expert`")
    if config.model.remat != 'full':
      lines.append("ModelConfig.remat = 'full' keeps the inputs of layers only")
    lines.append(f'TrainConfig.microbatches = {2 * config.train.microbatches} halves the activations')
    if config.mesh.host_gib == 0:
      lines.append(f"MeshConfig.host_gib = {math.ceil(plan.missing_bytes / GiB)} keeps so much of the optimizer's state in "
                   'the memory of the hosts; beyond that, twice as much for weights')
  else:
    lines.append('a larger MeshConfig.model splits the parameters, a smaller InferConfig.batch_size the cache')
  return [*lines, 'a larger slice']


def _faster(plan: Plan, config: Config) -> list[str]:
  """What speeds up a training step that is not bound by its arithmetic, most effective first."""
  lines = []
  if plan.bound == 'interconnect':
    if config.train.microbatches > 1:
      lines.append(f'TrainConfig.microbatches = {config.train.microbatches // 2}: parameters are gathered once for each')
    lines.append('a larger TrainConfig.batch_size, or another mesh: --search')
  elif plan.bound == 'memory':
    lines.append('fewer microbatches, or a larger TrainConfig.batch_size')
  return lines


def advice(plan: Plan, config: Config) -> list[str]:
  """What to change, most effective first, when a step does not fit or is bound by something other than compute."""
  if not plan.fits:
    return _smaller(plan, config)
  return _faster(plan, config) if plan.step == 'train' else []


def _memory(plan: Plan, slice_: Slice) -> str:
  there = slice_.chip.hbm
  if not plan.fits:
    return f'DOES NOT FIT: {plan.missing_bytes / GiB:.2f} GiB too much for {there / GiB:.2f}'
  left = there - plan.argument_bytes - plan.temporary_bytes
  host = f'; {plan.host_bytes / GiB:.2f} GiB in host memory' if plan.host_bytes else ''
  return (f'{plan.argument_bytes / GiB:.2f} GiB arguments + {plan.temporary_bytes / GiB:.2f} temporaries, '
          f'{left / GiB:.2f} of {there / GiB:.2f} left{host}')


def _speed(plan: Plan, slice_: Slice) -> list[str]:
  terms = ', '.join(f'{term} {seconds * 1e3:.2f} ms' for term, seconds in plan.seconds.items() if seconds)
  rate = plan.tokens / plan.step_seconds
  return [
      f'time of a step    at least {terms}: bound by {plan.bound}',
      f'at most           {plan.mfu(slice_):.1%} MFU, {rate:,.0f} tokens/s, {rate * 86400 / 1e9:,.2f} billion tokens a day']


def lines(plan: Plan, config: Config, slice_: Slice) -> list[str]:
  """The plan as text, a line for each of its parts, and what to try if it is not good. A plan that does not fit has no rate."""
  sizes = ' x '.join(f'{axis} {size}' for axis, size in plan.mesh.items() if axis != 'sharding')
  six_nd = f'; 6ND is {plan.six_nd:.3g}' if plan.step == 'train' else ''
  collectives = sorted(plan.collectives.items(), key=lambda item: -item[1]['seconds'])
  return [
      f'{plan.topology}  {slice_.count} chips as {sizes}, sharding {plan.mesh["sharding"]!r}; compiled in '
      f'{plan.compile_seconds:.0f} s',
      f'memory of a chip  {_memory(plan, slice_)}',
      f'arithmetic        {plan.model_flops:.3g} FLOPs for {plan.tokens:,.0f} tokens, {plan.executed_flops:.3g} with what is '
      f'computed again{six_nd}',
      *(f'  {kind:<18}{total["times"]:>9,.0f} times, {total["bytes"] / 1e9:>9.3f} GB sent by each chip, '
        f'{total["seconds"] * 1e3:>9.2f} ms' for kind, total in collectives),
      *(_speed(plan, slice_) if plan.fits else ()),
      *(f'  try: {line}' for line in advice(plan, config))]
