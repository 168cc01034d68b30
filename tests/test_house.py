"""Rules of the house: style, types, sizes, who may import what, declared dependencies, and that the map is true."""

import ast
import importlib.metadata
import pathlib
import re
import subprocess
import sys
from collections.abc import Iterator

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
LINKS = ('t5x_cpm/tasks/', 't5x_cpm/gin_files/')
FOUND = (file.relative_to(ROOT) for folder in ('t5x_cpm', 'tasks', 'tools', 'tests') for file in (ROOT / folder).rglob('*.py'))
SOURCES = sorted(file for file in FOUND if not str(file).startswith(LINKS))
# The library, with tasks/ under the name that code imports it by.
LIBRARY = [file for file in SOURCES if file.parts[0] == 't5x_cpm']
LIBRARY += [pathlib.Path('t5x_cpm') / file for file in SOURCES if file.parts[0] == 'tasks']

# A module imports only from lines above its own, or from its own line.
ORDER = (
    r't5x_cpm',
    r't5x_cpm\.config\.(fields|typed|template|model|task|delta|inherit|teacher|offload)',
    r't5x_cpm\.config\.(run|row_features)',
    r't5x_cpm\.config\.describe',
    r't5x_cpm\.config\.gin',
    r't5x_cpm\.config',
    r't5x_cpm\.(files|progress|stored|trees|user_files)',
    r't5x_cpm\.(backend|chips|mesh)',
    r't5x_cpm\.cluster(\.\w+)?',
    r't5x_cpm\.vocabularies(\.\w+)?',
    r't5x_cpm\.data(\.\w+)?',
    r't5x_cpm\.tasks(\.\w+)*',
    r't5x_cpm\.models(\.\w+)?',
    r't5x_cpm\.checkpoints(\.\w+)?',
    r't5x_cpm\.(tuning|inherit|infmoe)(\.\w+)?',
    r't5x_cpm\.training(\.\w+)?',
    r't5x_cpm\.inference(\.\w+)?',
    r't5x_cpm\.compile(\.\w+)?',
    r't5x_cpm\.api',
    r't5x_cpm\.cli\.(parse|errors)',
    r't5x_cpm\.cli\.configure',
    r't5x_cpm\.cli(\.modes)?',
    r't5x_cpm\.__main__',
)
TENSORFLOW = {'tensorflow', 'tensorflow_datasets', 'tensorflow_text', 'seqio'}
MAY_IMPORT_TENSORFLOW = ('t5x_cpm/inference/evaluate.py', 't5x_cpm/tasks/')
MAY_IMPORT_NNX = ('t5x_cpm/models/', 't5x_cpm/tuning/', 't5x_cpm/training/step.py')
OPTIONAL = {'peft', 'torch', 'transformers', 'triton', 'wandb'}  # extras, and what is used when it is there


def imports(file: pathlib.Path) -> Iterator[tuple[str, bool]]:
  """Every module that a file imports, and whether at its top level. `from a import b` gives a.b where that is our module."""
  tree = ast.parse((ROOT / file).read_text(encoding='utf-8'))
  top = set(tree.body)
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      for alias in node.names:
        yield alias.name, node in top
    elif isinstance(node, ast.ImportFrom):
      assert not node.level, f'{file}: relative import'
      for alias in node.names:
        full = f'{node.module}.{alias.name}'
        yield (full if module_file(full) else node.module or ''), node in top


def module_file(name: str) -> pathlib.Path | None:
  path = ROOT / name.replace('.', '/')
  return next((file for file in (path.with_suffix('.py'), path / '__init__.py') if file.is_file()), None)


def module_name(file: pathlib.Path) -> str:
  return '.'.join(file.with_suffix('').parts).removesuffix('.__init__')


def python(code: str) -> str:
  return subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def rank(name: str) -> int:
  ranks = [index for index, pattern in enumerate(ORDER) if re.fullmatch(pattern, name)]
  assert ranks, f'{name} has no place in ORDER: say where it stands'
  return ranks[0]


def test_ruff():
  command = [sys.executable, '-m', 'ruff', 'check', '--quiet', '--output-format=concise', '.']
  result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
  assert result.returncode == 0, result.stdout + result.stderr


# The oldest Python that setup.py allows, and this one.
@pytest.mark.parametrize('version', sorted({'3.11', f'{sys.version_info.major}.{sys.version_info.minor}'}))
def test_types(version):
  command = [sys.executable, '-m', 'mypy', f'--python-version={version}', 't5x_cpm']
  result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
  assert result.returncode == 0, result.stdout + result.stderr


def test_no_file_is_two_things():
  long = {str(file): lines for file in SOURCES if (lines := (ROOT / file).read_text(encoding='utf-8').count('\n')) > 400}
  assert not long, f'above 400 lines: {long}'


def test_import_order():
  wrong = []
  for file in LIBRARY:
    name = module_name(file)
    for imported, _ in imports(file):
      ours = imported.split('.')[0] == 't5x_cpm'
      if ours and rank(imported) > rank(name):
        wrong.append(f'{file} imports {imported}')
      if imported.split('.')[0] in ('tests', 'tools', 'tasks'):
        wrong.append(f'{file} imports {imported}')
  assert not wrong, '\n'.join(wrong)


def test_no_import_cycles():
  edges = {module_name(file): {name for name, top in imports(file) if top and name.startswith('t5x_cpm')} for file in LIBRARY}
  done, path = set(), []

  def visit(name):
    assert name not in path, ' -> '.join([*path[path.index(name):], name])
    if name not in done:
      path.append(name)
      for other in edges.get(name, ()):
        visit(other)
      done.add(path.pop())

  for name in edges:
    visit(name)


@pytest.mark.parametrize('names, allowed', [(TENSORFLOW, MAY_IMPORT_TENSORFLOW), ({'flax'}, MAY_IMPORT_NNX)])
def test_heavy_imports_stay_where_they_belong(names, allowed):
  found = {str(file) for file in LIBRARY for name, _ in imports(file) if name.split('.')[0] in names}
  assert found, 'nothing imports it: the rule is out of date'
  assert all(file.startswith(allowed) for file in found), found


def test_config_and_command_line_start_without_jax():
  assert python('import t5x_cpm.config, t5x_cpm.config.gin, t5x_cpm.__main__, t5x_cpm.tasks, sys; '
                'print({"jax", "tensorflow"} & set(sys.modules))') == 'set()'


def test_import_of_the_package_is_free():
  code = ('import sys, time; before = set(sys.modules); start = time.perf_counter(); import t5x_cpm; '
          'print(time.perf_counter() - start, sorted(set(sys.modules) - before), t5x_cpm.__version__)')
  seconds, rest = python(code).split(' ', 1)
  assert float(seconds) < 0.1
  assert rest.startswith("['t5x_cpm'] ")


def test_every_dependency_is_declared():
  """What code imports is in requirements.txt, and nothing stands there for no reason."""
  text = (ROOT / 'requirements.txt').read_text()
  lines = [line for line in text.splitlines() if line and not line.startswith('#')]
  assert all(re.fullmatch(r'[\w.\[\]-]+(==[\d.]+|>=[\d.]+,<[\d.]+)', line) for line in lines), 'bounds on both sides'
  normal = lambda name: re.sub(r'[-_.]+', '-', name).lower()  # noqa: E731
  declared = {normal(re.split(r'[\[=<>]', line)[0]) for line in lines}
  distributions = importlib.metadata.packages_distributions()
  local = {'t5x_cpm', 'tests', 'tasks', 'tools'} | {file.stem for file in SOURCES if file.parts[0] in ('tests', 'tools')}
  used, undeclared = set(), []
  for file in SOURCES:
    for top in {name.split('.')[0] for name, _ in imports(file)} - local - sys.stdlib_module_names - OPTIONAL:
      names = {normal(name) for name in distributions.get(top, [top])}
      used |= names & declared
      if not names & declared:
        undeclared.append(f'{file} imports {top}, of {" or ".join(names)}')
  assert not undeclared, 'not in requirements.txt:\n' + '\n'.join(undeclared)
  tools = {'ipykernel', 'mypy', 'pytest-xdist', 'ruff', 'wheel', 'setuptools'}  # run, not imported
  # Needed by seqio, by tensorflow-datasets (which does not say so), to look at what was written, for the numbers of its model.
  indirect = {'importlib-resources', 'tensorflow-text', 'tensorflow-datasets', 'tensorboard', 'jieba'}
  assert declared - used <= tools | indirect, f'nothing imports {declared - used - tools - indirect}'


def test_the_map_in_contributing_is_true():
  """Every module of the library stands in the map of CONTRIBUTING.md, and everything in the map exists."""
  block = re.search(r'```\n(t5x_cpm/\n.*?)```', (ROOT / 'CONTRIBUTING.md').read_text(encoding='utf-8'), re.DOTALL)
  assert block, 'CONTRIBUTING.md has no map'
  named, folders = set(), []
  for line in block[1].splitlines():
    indent, entry = len(line) - len(line.lstrip()), line.split()[0]
    if indent % 2 or not re.fullmatch(r'[\w./]+', entry) or '.' not in entry and not entry.endswith('/'):
      continue  # the text of an entry goes on
    folders = folders[:indent // 2]
    path = '/'.join([*folders, entry.rstrip('/')])
    assert (ROOT / path).exists(), f'CONTRIBUTING.md names {path}, which does not exist'
    if entry.endswith('/'):
      folders.append(entry.rstrip('/'))
    else:
      named.add(path)
  files = {str(file) for file in SOURCES if file.parts[0] in ('t5x_cpm', 'tasks')}
  assert files - named == set(), 'files that the map in CONTRIBUTING.md does not name'
