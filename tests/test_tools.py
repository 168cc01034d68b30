"""The scripts in tools/ refuse what they cannot use as the modes do: in a line, with exit code 2."""

import os
import pathlib
import runpy
import subprocess
import sys

import pytest

TOOLS = pathlib.Path(__file__).resolve().parent.parent / 'tools'


@pytest.mark.parametrize('script, arguments, complaint', [
    ('pod_table.py', [], 'expected the plans'), ('pod_table.py', ['{folder}'], 'is a folder: expected a file'),
    ('pod_table.py', ['{folder}/gone.json'], 'gone.json does not exist'),
    ('pod_table.py', ['{folder}/list.json'], 'list.json: expected a JSON object, got [1]'),
    ('pod_table.py', ['{folder}/other.json'], "other.json: not a plan that `t5x_cpm compile --output` wrote (no 'step')"),
    ('quickstart.py', ['--steps=-3'], "'-3': expected a whole number from 0"), ('quickstart.py', ['--stps=3'], '--stps=3'),
    ('quickstart.py', ['--output={folder}'], 'model exists: remove'),
    ('quickstart.py', ['--output={folder}/list.json/x'], 'Not a directory'),
    ('golden_t5.py', ['--output'], 'expected one argument'), ('golden_t5.py', ['x'], 'unrecognized arguments: x'),
    ('golden_peft.py', ['--output'], 'expected one argument'),
    ('benchmarks/reader_speed.py', ['--documents=many'], "'many': expected a whole number from 0"),
    ('benchmarks/reader_speed.py', ['--batch_size=0'], "'0': expected a whole number from 1")])
def test_scripts_refuse_in_a_line(tmp_path, monkeypatch, capsys, script, arguments, complaint):
  (tmp_path / 'list.json').write_text('[1]')
  (tmp_path / 'other.json').write_text('{"a": 1}')
  (tmp_path / 'model').mkdir()
  monkeypatch.setattr(sys, 'argv', [script, *(argument.format(folder=tmp_path) for argument in arguments)])
  with pytest.raises(SystemExit) as end:
    runpy.run_path(str(TOOLS / script), run_name='__main__')
  out, err = capsys.readouterr()
  assert end.value.code == 2 and not out and err.startswith('error: ') and err.count('\n') == 1 and complaint in err, err


@pytest.mark.slow
def test_the_recipe_trains_three_stages(tmp_path):
  command = ['bash', str(TOOLS / 'cpm2_recipe.sh'), str(tmp_path / 'recipe'), '4 6 8']
  done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {
      'JAX_PLATFORMS': 'cpu', 'T5X_CPM_CACHE': str(tmp_path / 'cache')})
  assert done.returncode == 0, done.stderr[-3000:]
  assert 'as the function stays the same' in done.stdout and (tmp_path / 'recipe' / 'experts' / 'loss.png').exists()
