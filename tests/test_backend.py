"""What depends on the platform."""

import os
import signal
import subprocess
import sys
import types

import jax
import pytest

from t5x_cpm import backend, mesh
from t5x_cpm.config import ConfigError, MeshConfig

# Twenty blocks of 32 MB, each freed before the next: without the setting every one of them is 8,192 pages new to the process.
FAULTS = """
import resource
from t5x_cpm import backend
if {keep}:
  backend.keep_memory()
  import jax
  assert jax.config.values['jax_cpu_enable_async_dispatch'] is False
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
  b'1' * 2**25
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != 'linux', reason='the setting is one of glibc')
def test_freed_memory_is_used_again():
  def faults(keep: bool) -> int:
    return int(subprocess.run([sys.executable, '-c', FAULTS.format(keep=keep)], capture_output=True, check=True).stdout)

  assert faults(True) < 0.3 * faults(False)


def test_memory_is_left_alone_where_there_is_an_accelerator(monkeypatch):
  called = []
  monkeypatch.setattr(backend.ctypes, 'CDLL', lambda name: called.append(name) or types.SimpleNamespace())  # has no mallopt
  monkeypatch.setattr(backend, 'ACCELERATORS', ('/nowhere', __file__))
  for platforms, touched in (('cuda', False), ('', False), (None, False), ('cpu', True)):
    monkeypatch.delenv('JAX_PLATFORMS', raising=False)
    if platforms is not None:
      monkeypatch.setenv('JAX_PLATFORMS', platforms)
    backend.keep_memory()
    assert bool(called) == touched, platforms
  monkeypatch.delenv('JAX_PLATFORMS')
  monkeypatch.setattr(backend, 'ACCELERATORS', ('/nowhere',))
  backend.keep_memory()
  assert len(called) == 2


def test_deterministic_kernels_are_asked_for_on_gpus_alone():
  assert backend.compiler_options(True) is None
  with backend.compiling_for('cuda'):
    assert backend.compiler_options(False) is None
    options = backend.compiler_options(True)
  assert options
  doubled = jax.jit(lambda x: 2 * x, compiler_options=options)  # XLA refuses an option that it does not know
  assert doubled(1.0) == 2.0
  with pytest.raises(jax.errors.JaxRuntimeError, match='xla_gpu_no_such_option'):
    jax.jit(lambda x: 2 * x, compiler_options={'xla_gpu_no_such_option': True})(1.0)


GPU = r"\(JAX was installed without it\): install the extra, pip install -e '\.\[gpu\]', .* JAX_PLATFORMS=cpu"


@pytest.mark.parametrize('platform, error, message', [
    ('cuda', AssertionError(), GPU),
    ('tpu', RuntimeError('No TPU found.\nsome trace'), r"\(No TPU found\.\): install the extra, pip install -e '\.\[tpu\]'"),
    ('abacus', RuntimeError('Unknown backend'), r'\(Unknown backend\): set JAX_PLATFORMS=cpu\.$')])
def test_a_platform_that_is_not_there_is_told_in_a_line(monkeypatch, platform, error, message):
  def fail():
    raise error

  monkeypatch.setenv('JAX_PLATFORMS', platform)
  for name in ('devices', 'local_devices'):
    monkeypatch.setattr(jax, name, fail)
  for call in (mesh.make_mesh, lambda config: backend.devices(local=True), lambda config: backend.use_cpu_devices(0)):
    with pytest.raises(ConfigError, match=f'^JAX_PLATFORMS={platform}: JAX cannot start there {message}') as found:
      call(MeshConfig())
    assert '\n' not in str(found.value)


@pytest.mark.parametrize('own', ['', 'mine'])
def test_compiled_programs_are_kept_in_the_cache_or_where_the_user_says(tmp_path, own):
  code = ('import jax; from t5x_cpm import backend; backend.keep_compiled_programs(); '
          'jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0); jax.jit(lambda x: x + 1)(1)')
  variables = {name: value for name, value in os.environ.items() if name != 'JAX_COMPILATION_CACHE_DIR'}
  variables |= {'T5X_CPM_CACHE': str(tmp_path / 'cache')} | ({'JAX_COMPILATION_CACHE_DIR': str(tmp_path / own)} if own else {})
  subprocess.run([sys.executable, '-c', code], env=variables, check=True)
  assert any((tmp_path / (own or 'cache/xla')).iterdir())
  assert (tmp_path / 'cache').exists() == (not own)


NOISE = [
    'Failed to find host bounds for accelerator type: WARNING: could not determine TPU accelerator type',
    'WARNING: Logging before InitGoogle() is written to STDERR', '=== Source Location Trace: === ',
    'learning/45eac/tfrc/runtime/libtpu_init_utils.cc:370',
    'WARNING: All log messages before absl::InitializeLog() is called are written to STDERR',
    'I0000 00:00:1795750128.014344   10991 port.cc:153] oneDNN custom operations are on.',
    'W1127 03:12:09.605786    2764 spmd_partitioner.cc:656] [SPMD] Involuntary full rematerialization.',
    'E0000 00:00:1795750105.240562   10921 cuda_platform.cc:52] failed call to cuInit: INTERNAL',
    '2026-11-27 03:12:09.605786: I tensorflow/core/util/port.cc:153] oneDNN custom operations are on.']
MATTERS = [
    'F1127 03:23:26.720050    6717 client.h:80] Terminating process', 'Traceback (most recent call last):', 'ValueError: W1127',
    'WARNING: a file of yours is empty', 'Fatal Python error: Segmentation fault', 'error: 你好', '']


def in_quiet(last: str, **variables: str) -> subprocess.CompletedProcess:
  """Noise and what matters, written by Python and by C within a quiet block, and then `last`."""
  code = f"""
import os, sys
from t5x_cpm import backend
backend.hide_logs()
with backend.quiet():
  for line in {NOISE + MATTERS!r}:
    os.write(2, line.encode() + b'\\n')
  print('from Python', file=sys.stderr)
  {last}
print('after', os.environ.get('TF_CPP_MIN_LOG_LEVEL'), file=sys.stderr)
"""
  ours = 'TF_CPP_MIN_LOG_LEVEL', 'T5X_CPM_VERBOSE'
  environment = {name: value for name, value in os.environ.items() if name not in ours}
  return subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, env=environment | variables)


def test_logs_of_libraries_are_hidden_and_nothing_else():
  done = in_quiet('pass')
  assert done.stderr.splitlines() == [*MATTERS, 'from Python', 'after 3'] and done.returncode == 0
  done = in_quiet('pass', T5X_CPM_VERBOSE='1')
  assert done.stderr.splitlines() == [*NOISE, *MATTERS, 'from Python', 'after None']
  assert in_quiet('pass', PATH='/nowhere', TF_CPP_MIN_LOG_LEVEL='0').stderr.splitlines() == [
      *NOISE, *MATTERS, 'from Python', 'after 0']  # a machine without grep


@pytest.mark.parametrize('last, words, code', [
    ('os.abort()', '', -signal.SIGABRT), ('raise RuntimeError("a bug")', 'RuntimeError: a bug', 1),
    ('import faulthandler; faulthandler.enable(); os.kill(os.getpid(), 11)', 'Fatal Python error', -signal.SIGSEGV)])
def test_a_crash_in_a_quiet_block_is_seen(last, words, code):
  done = in_quiet(last)
  assert done.returncode == code and done.stderr.startswith('\n'.join(MATTERS)) and words in done.stderr
  assert not set(done.stderr.splitlines()) & set(NOISE)
