"""Prints the rows of the README's table of pods from what `t5x_cpm compile --output=MODEL-SLICE-STEP.json` has written.

  python tools/pod_table.py plans/*.json
"""

import json
import pathlib
import sys

GiB = 2**30
HEAD = '| model | slice | step | mesh (data x model x expert) | GiB of a chip | bound by | MFU at most | tokens a day |'


def row(path: pathlib.Path) -> str:
  plan = json.loads(path.read_text())
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
  if not paths or not all(path.exists() for path in paths):
    sys.exit(__doc__)
  print(HEAD + '\n|---|---|---|---|---:|---|---:|---:|')
  print('\n'.join(row(path) for path in paths))


if __name__ == '__main__':
  main()
