"""README.md: blocks marked `run` work, one after the other in an empty folder; every other command says why it is not run."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

from t5x_cpm.cli import modes
from t5x_cpm.config import gin

ROOT = pathlib.Path(__file__).resolve().parent.parent
README = (ROOT / 'README.md').read_text(encoding='utf-8')
BLOCKS = re.findall(r'^```(\S*)[ \t]*(.*?)\n(.*?)^```[ \t]*$', README, re.MULTILINE | re.DOTALL)  # language, attributes, text


def test_every_command_is_run_or_says_why_not():
  assert any(attributes == 'run' for _, attributes, _ in BLOCKS)
  for language, attributes, text in BLOCKS:
    if language in ('bash', 'sh', 'console', 'shell', 'python', 'py'):
      assert language in ('bash', 'python'), f'write ```bash or ```python, not ```{language}:\n{text}'
      assert attributes == 'run' or re.fullmatch(r'reason="[^"]{8,}"', attributes), f'neither `run` nor a reason:\n{text}'


def test_names_in_the_text_exist():
  for path in set(re.findall(r'\b((?:gin|tools|tasks|tests|t5x_cpm)/[\w./]+\.(?:gin|py|sh|txt|md))\b', README)):
    assert (ROOT / path).is_file(), path


def test_the_table_of_models_is_true():
  rows = {row[0]: tuple(row[1:]) for row in re.findall(r'^\| `(\w+)` ' + r'\| ([^|]+?) ' * 6 + r'\|$', README, re.MULTILINE)}
  assert set(rows) == set(gin.shipped_files('models'))
  for name, row in rows.items():
    c = gin.load([f'gin/models/{name}.gin']).model
    assert f' {row[0]} parameters' in gin.summary('models', name)  # which another test compares with the model
    layers, experts = f'{c.num_encoder_layers} + {c.num_decoder_layers}', c.moe.num_experts
    if experts:
      assert c.moe.encoder_every == c.moe.decoder_every
      layers += f', {experts} experts ' + {1: 'each', 2: 'in every other'}[c.moe.encoder_every]
    assert row[1:] == (f'{c.vocab_size:,}', layers, str(c.d_model), str(c.d_ff), f'{c.num_heads} x {c.head_dim}'), name


def test_the_table_of_modes_is_true():
  table = re.search(r'^\| mode \| what it does \|\n(.*?)\n\n', README, re.MULTILINE | re.DOTALL)
  assert table
  assert set(re.findall(r'`(\w+)`', '\n'.join(row.split('|')[1] for row in table[1].splitlines()))) == set(modes.MODES)


def test_blocks_define_what_they_use():
  defined: set[str] = set()
  commands = [text for language, attributes, text in BLOCKS if (language, attributes) == ('bash', 'run')]
  assert commands[0] == '. .venv/bin/activate\n', 'without it `python` is another one'
  for text in commands:
    defined |= set(re.findall(r'\b(?:export|for) (\w+)', text))
    assert set(re.findall(r'\$\{?([A-Za-z_]\w*)', text)) <= defined, text


@pytest.fixture
def clone(tmp_path) -> pathlib.Path:
  """What tools/quickstart.sh leaves at the top of a clone: its files, and an environment that is not active."""
  folder = tmp_path / 'clone'
  (folder / '.venv' / 'bin').mkdir(parents=True)
  for path in ROOT.iterdir():
    if not path.name.startswith('.') and path.name not in ('runs', 'tour'):
      (folder / path.name).symlink_to(path)
  (folder / '.venv' / 'bin' / 'activate').write_text(f'export PATH="{pathlib.Path(sys.executable).parent}:$PATH"\n')
  return folder


@pytest.mark.slow
def test_blocks_run_in_order(clone, tmp_path):
  """Each block in a shell of its own, with what those before it exported."""
  environment = {name: value for name, value in os.environ.items() if name not in ('PYTHONPATH', 'T5X_CPM', 'VIRTUAL_ENV')} | {
      'T5X_CPM_CACHE': str(tmp_path / 'cache'), 'JAX_PLATFORMS': 'cpu'}
  if sys.prefix != sys.base_prefix:  # not yet active
    own = os.path.dirname(sys.executable)
    environment['PATH'] = ':'.join(path for path in environment['PATH'].split(':') if os.path.abspath(path) != own)
  if subprocess.run([sys.executable, '-c', 'import t5x_cpm'], cwd=tmp_path, capture_output=True, env=environment).returncode:
    environment['PYTHONPATH'] = str(ROOT)  # the package is not installed, only checked out
  for language, attributes, text in BLOCKS:
    if attributes == 'run':
      command = (['bash', '-euo', 'pipefail', '-c', f'{text}\nenv -0 > "{tmp_path}/environment"'] if language == 'bash' else
                 ['python', '-c', text])
      result = subprocess.run(command, cwd=clone, env=environment, capture_output=True, text=True, timeout=600)
      print(text, result.stdout, sep='\n')
      assert result.returncode == 0, f'{text}\n{result.stdout}\n{result.stderr}'
      variables = (tmp_path / 'environment').read_text().rstrip('\0').split('\0')
      environment = dict(variable.split('=', 1) for variable in variables)
