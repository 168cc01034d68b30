"""Planning for chips that are not there: does a step fit, what do the chips send, how fast can it be at best.

`run` is the mode `compile`. It compiles the very step that training or inference would run. `slices` describes the chips,
`plan` compiles a step for them and weighs the result, which `program` reads from the compiler's text and `report` puts into
words; `search` looks for a mesh that suits, first by the formulas of `estimate`, then by compiling. Nothing here runs a step,
needs an accelerator, or reads data.
"""

import dataclasses
import json
import os
import pathlib
from typing import Any

from t5x_cpm.chips import GiB
from t5x_cpm.config import Config, ConfigError
from t5x_cpm.config.fields import did_you_mean


def run(config: Config, topology: str, step: str = 'train', *, search: bool = False, output: str = '') -> dict[str, Any]:
  """Compiles a step for a slice and prints the plan; with `search`, for the best mesh that it finds.

  Args:
    config: model, mesh, task lengths and batch sizes.
    topology: the slice, as in 'v5p:4x4x4'; MeshConfig.slices says how many TPU slices there are.
    step: 'train', 'encode' or 'decode'.
    search: choose mesh, sharding, rematerialisation and microbatches, and write them beside `output` as a gin file.
    output: JSON file to write the plan to.

  Returns:
    The plan as a dict, the same as in the file.

  Raises:
    ConfigError: the slice or step is unknown, its compiler is missing, the mesh cannot split the model, or the step does not
      fit, which is said after the plan is printed and written.
  """
  from t5x_cpm.compile import plan, report, slices
  from t5x_cpm.compile import search as search_lib

  if step not in plan.STEPS:
    raise ConfigError(f'--step={step}: expected one of {", ".join(plan.STEPS)}.{did_you_mean(step, plan.STEPS)}')
  slice_ = slices.parse(topology, config.mesh.slices)
  path = pathlib.Path(output)
  if output:  # checked now rather than after minutes
    path.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(path.parent, os.W_OK) or path.is_dir():
      raise ConfigError(f'--output={output} cannot be written: expected a file in a folder that can.')
  if search:
    config, made = search_lib.best(config, slice_, step)
  else:
    made = plan.make(config, slice_, step)
  print('\n'.join(report.lines(made, config, slice_)), flush=True)
  speed = (made.bound, made.step_seconds, made.mfu(slice_)) if made.fits else (None, None, None)
  result = dataclasses.asdict(made) | dict(zip(('bound', 'step_seconds', 'mfu'), speed))
  if output:
    path.write_text(json.dumps(result, indent=2) + '\n')
  if search:
    text = search_lib.as_gin(config)
    print(text, end='')
    if output:
      path.with_suffix('.gin').write_text(f'# {slice_.count} chips, {slice_.title}: found by compile --search\n{text}')
  if not made.fits:
    raise ConfigError(f'the step does not fit a chip of {slice_.title}: {made.missing_bytes / GiB:.2f} GiB too much.')
  return result
