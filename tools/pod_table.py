"""Prints the rows of the README's table of pods from what `t5x_cpm compile --output=MODEL-SLICE-STEP.json` has written.

  python tools/pod_table.py plans/*.json
"""

import pathlib
import sys

from t5x_cpm import stored, user_files
from t5x_cpm.cli.errors import run_script
from t5x_cpm.config import ConfigError

GiB = 2**30
HEAD = '| model | slice | step | mesh (data x model x expert) | GiB of a chip | bound by | MFU at most | tokens a day |'


# What is read of a plan; it has more.
FORM = {
    'step': str, 'topology': str, 'mesh': {'data': int, 'model': int, 'expert': int, 'sharding': str, str: lambda value: True},
    'argument_bytes': float, 'temporary_bytes': float, 'host_bytes': float, 'fits': bool, 'missing_bytes': float,
    'tokens': float, **dict.fromkeys(('step_seconds', 'mfu', 'bound'), lambda value: True)}  # null where the step does not fit


def row(path: pathlib.Path) -> str:
  plan = user_files.json_file(path, str(path))
  if wrong := stored.mismatch({name: value for name, value in plan.items() if name in FORM}, FORM):
    raise ConfigError(f'{path}: not a plan that `t5x_cpm compile --output` wrote ({wrong}).')
  mesh = plan['mesh']
  text = f'{mesh["data"]} x {mesh["model"]} x {mesh["expert"]}' + (f", '{mesh['sharding']}'" if plan['step'] == 'train' else '')
  memory = f'{(plan["argument_bytes"] + plan["temporary_bytes"]) / GiB:.1f}'
  if plan['host_bytes']:
    memory += f' + {plan["host_bytes"] / GiB:.1f} of host'
  if not plan['fits']:
    memory = f'{plan["missing_bytes"] / GiB:.1f} too much'
    return f'| `{path.name.split("-")[0]}` | {plan["topology"]} | {plan["step"]} | {text} | {memory} | | | |'
  step = 'training' if plan['step'] == 'train' else f'{plan["step"]}, {plan["step_seconds"] * 1e3:.1f} ms'
  rate = plan['tokens'] / plan['step_seconds'] * 86400 / 1e9
  return (f'| `{path.name.split("-")[0]}` | {plan["topology"]} | {step} | {text} | {memory} | {plan["bound"]} | '
          f'{100 * plan["mfu"]:.0f} % | {rate:.1f} billion |')


def main() -> None:
  paths = [pathlib.Path(name) for name in sys.argv[1:]]
  if not paths:
    raise ConfigError('expected the plans: python tools/pod_table.py plans/*.json')
  rows = [row(path) for path in paths]
  print(HEAD + '\n|---|---|---|---|---:|---|---:|---:|')
  print('\n'.join(rows))


if __name__ == '__main__':
  run_script(main)
