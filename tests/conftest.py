"""Fixtures that several test files share."""

import contextlib
import importlib.metadata
import os
import pathlib
import shutil
import tempfile

import pytest

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
# Tiny models are compiled far more than they are run. Without LLVM's optimisations the suite takes half the time, and with the
# older code generator for fused operations a training step compiles in 1.6 s instead of 4.3; jaxlib 0.12 has it no longer.
FLAGS = ['--xla_backend_optimization_level=0']
if tuple(map(int, importlib.metadata.version('jaxlib').split('.')[:2])) < (0, 11):
  FLAGS.append('--xla_cpu_use_fusion_emitters=false')
os.environ.setdefault('XLA_FLAGS', ' '.join(FLAGS))
# A torch that was built for GPUs brings triton 3.7, which crashes if TensorFlow 2.21 was imported before it.
with contextlib.suppress(ImportError):
  import triton  # noqa: F401
ROOT = pathlib.Path(__file__).resolve().parent.parent


def pytest_configure(config: pytest.Config) -> None:
  """Has this process, the workers and every program that a test starts share what they compile, until the tests end.

  Not from one session to the next: JAX does not write its entries atomically, and tests kill processes. Whoever wants that
  sets JAX_COMPILATION_CACHE_DIR.
  """
  os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0.1')
  if 'JAX_COMPILATION_CACHE_DIR' not in os.environ:  # of a worker it is the one of the process that started it
    os.environ['JAX_COMPILATION_CACHE_DIR'] = folder = tempfile.mkdtemp(prefix='t5x_cpm-tests-')
    config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
  """The longest test begins early, so that no worker is left alone with it."""
  items.sort(key=lambda item: item.name != 'test_blocks_run_in_order')


@pytest.fixture(scope='session')
def shared_data() -> pathlib.Path:
  """Real data sets in their original formats; a checkout of the project alone does not have them."""
  path = ROOT.parent / 'shared' / 'data'
  if not path.is_dir():
    pytest.skip('the folder of real data sets (../shared/data) is not beside this checkout')
  return path
