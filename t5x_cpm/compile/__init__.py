"""Compiling for a pod on any machine: does it fit, what does it send, how fast can it be."""

import dataclasses
import json
import os
import pathlib
from typing import Any

from t5x_cpm.config import Config, ConfigError
from t5x_cpm.config.fields import did_you_mean


def run(config: Config, topology: str, step: str = 'train', *, search: bool = False, output: str = '') -> dict[str, Any]:
  """Compiles a step for a slice and prints what that says; with `search` for the best mesh that can be found.

  Args:
    config: model, mesh, task lengths and batch sizes.
    topology: as in 'v5p:4x4x4'; of TPUs, MeshConfig.slices of them.
    step: 'train', 'encode' or 'decode'.
    search: choose mesh, sharding, rematerialisation and microbatches, and write them beside `output` as a gin file.
    output: JSON file of the plan.

  Raises:
    ConfigError: unknown slice or step, missing libtpu, or a model that the mesh cannot split.
  """
  from t5x_cpm.compile import chips, plan
  from t5x_cpm.compile import search as search_lib

  if step not in plan.STEPS:
    raise ConfigError(f'--step={step}: expected one of {", ".join(plan.STEPS)}.{did_you_mean(step, plan.STEPS)}')
  slice_ = chips.parse(topology, config.mesh.slices)
  path = pathlib.Path(output)
  if output:  # told now, not after minutes
    path.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(path.parent, os.W_OK) or path.is_dir():
      raise ConfigError(f'--output={output} cannot be written: expected a file in a folder that can.')
  if search:
    config, made = search_lib.best(config, slice_, step)
  else:
    made = plan.make(config, slice_, step)
  plan.show(made, config, slice_)
  result = dataclasses.asdict(made) | {'bound': made.bound, 'step_seconds': made.step_seconds, 'mfu': made.mfu(slice_)}
  if output:
    path.write_text(json.dumps(result, indent=2) + '\n')
  if search:
    text = search_lib.as_gin(config)
    print(text, end='')
    if output:
      path.with_suffix('.gin').write_text(f'# {slice_.count} chips, {slice_.title}: found by compile --search\n{text}')
  return result
