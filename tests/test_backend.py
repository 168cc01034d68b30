"""What depends on the platform."""

import subprocess
import sys

import pytest

# Twenty blocks of 32 MB, each freed before the next: without the setting every one of them is 8,192 pages new to the process.
FAULTS = """
import resource
from t5x_cpm import backend
if {keep}:
  backend.keep_memory()
for _ in range(20):
  b'1' * 2**25
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
"""


@pytest.mark.skipif(sys.platform != 'linux', reason='the setting is one of glibc')
def test_freed_memory_is_used_again():
  def faults(keep: bool) -> int:
    return int(subprocess.run([sys.executable, '-c', FAULTS.format(keep=keep)], capture_output=True, check=True).stdout)

  assert faults(True) < 0.3 * faults(False)
