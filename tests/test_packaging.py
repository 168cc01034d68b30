"""The wheel is complete: it trains from a folder that has nothing of the clone."""

import json
import os
import pathlib
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent


def test_links_are_relative_and_lead_to_the_folders():
  for link, target in (('t5x_cpm/tasks', '../tasks'), ('t5x_cpm/gin_files', '../gin')):
    assert os.readlink(ROOT / link) == target
    assert (ROOT / link).is_dir()
  assert not (ROOT / 'gin' / '__init__.py').exists()  # it would hide gin-config


def test_setup_env_says_that_it_is_to_be_sourced():
  done = subprocess.run(['bash', ROOT / 'tools' / 'setup_env.sh'], capture_output=True, text=True)
  assert (done.returncode, done.stdout) == (2, '') and 'it is to be sourced: . tools/setup_env.sh && setup_env' in done.stderr
  script = f'set -euo pipefail; . {ROOT}/tools/setup_env.sh; type setup_env'
  done = subprocess.run(['bash', '-c', script], capture_output=True, text=True)
  assert done.returncode == 0 and not done.stderr


def run(command: list[object], cwd: pathlib.Path, **variables: str) -> str:
  environment = {name: value for name, value in os.environ.items() if name != 'PYTHONPATH'} | variables
  words = [str(word) for word in command]
  result = subprocess.run(words, cwd=cwd, env=environment, capture_output=True, text=True, timeout=600)
  assert result.returncode == 0, f'{command}\n{result.stdout}\n{result.stderr}'
  return result.stdout


@pytest.mark.slow
def test_wheel_trains_from_another_folder(tmp_path):
  # Building writes into the tree, so it gets a copy.
  tree, elsewhere = tmp_path / 'tree', tmp_path / 'elsewhere'
  hidden = shutil.ignore_patterns('.*', '__pycache__', '*.egg-info', 'build', 'runs_of_mine')
  tree.mkdir()
  elsewhere.mkdir()
  for name in ('t5x_cpm', 'gin', 'tasks'):
    shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=hidden)
  for name in ('setup.py', 'requirements.txt', 'README.md', 'LICENSE'):
    shutil.copy(ROOT / name, tree / name)
  run([sys.executable, '-m', 'pip', 'wheel', '-q', '--no-deps', '--no-build-isolation', '-w', tmp_path, tree], cwd=tmp_path)
  wheel, = tmp_path.glob('*.whl')

  packed = set(zipfile.ZipFile(wheel).namelist())
  for folder, prefix in (('gin', 't5x_cpm/gin_files'), ('tasks', 't5x_cpm/tasks'), ('t5x_cpm', 't5x_cpm')):
    for file in (tree / folder).rglob('*'):
      name = f'{prefix}/{file.relative_to(tree / folder)}'
      if file.is_file() and '__pycache__' not in name:
        assert name in packed, f'{name} is missing from the wheel'
  assert not [name for name in packed if not name.startswith(('t5x_cpm/', 't5x_cpm-'))]

  # An environment with this wheel and, by a .pth file, the dependencies that are installed here.
  venv.create(tmp_path / 'venv', with_pip=False)
  python = tmp_path / 'venv' / 'bin' / 'python'
  site = pathlib.Path(run([python, '-c', 'import sysconfig; print(sysconfig.get_paths()["purelib"])'], cwd=elsewhere).strip())
  (site / 'dependencies.pth').write_text(sysconfig.get_paths()['purelib'])
  run([sys.executable, '-m', 'pip', '--python', python, 'install', '--quiet', '--no-deps', '--no-index', wheel], cwd=elsewhere)
  place = run([python, '-c', 'import t5x_cpm.config; print(t5x_cpm.__file__)'], cwd=elsewhere)
  assert str(site) in place

  program = tmp_path / 'venv' / 'bin' / 't5x_cpm'
  variables = {'JAX_PLATFORMS': 'cpu', 'T5X_CPM_CACHE': str(tmp_path / 'cache')}
  assert 'cpm2_tiny' in run([program, 'files'], elsewhere)
  run([program, 'train', '--gin_file=gin/runs/quickstart.gin', '--gin_file=gin/models/cpm2_tiny.gin', '--model_dir=run',
       '--gin.TrainConfig.steps=3', '--gin.MetricsConfig.every=1', '--gin.TrainConfig.eval_batches=1'], elsewhere, **variables)
  records = [json.loads(line) for line in (elsewhere / 'run' / 'metrics.jsonl').read_text().splitlines()]
  assert [record['step'] for record in records if record['split'] == 'train'] == [1, 2, 3]
