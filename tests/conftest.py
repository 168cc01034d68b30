"""Fixtures that several test files share."""

import os
import pathlib

import pytest

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
# Tiny models are compiled far more than they are run: without LLVM's optimisations the suite takes half the time.
os.environ.setdefault('XLA_FLAGS', '--xla_backend_optimization_level=0')
ROOT = pathlib.Path(__file__).resolve().parent.parent


@pytest.fixture(scope='session')
def shared_data() -> pathlib.Path:
  """Real data sets in their original formats; a checkout of the project alone does not have them."""
  path = ROOT.parent / 'shared' / 'data'
  if not path.is_dir():
    pytest.skip('the folder of real data sets (../shared/data) is not beside this checkout')
  return path
