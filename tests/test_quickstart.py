"""tools/quickstart.py: what it tells to do next can be typed as it stands."""

import pathlib
import runpy
import subprocess

ROOT = pathlib.Path(__file__).resolve().parent.parent


def test_commands_to_go_on_with_work_in_a_shell_without_the_environment():
  commands = runpy.run_path(str(ROOT / 'tools' / 'quickstart.py'))['next_commands'](pathlib.Path('/no such/model'))
  done = [subprocess.run(['bash', '-c', command], cwd=ROOT, capture_output=True, text=True, env={'PATH': '/usr/bin:/bin'})
          for command in commands]
  assert 'No checkpoint in /no such/model' in done[0].stderr
  assert done[1].returncode == 0, done[1].stderr
