"""What depends on the platform that JAX runs on: the one place where CPU and accelerators are told apart."""

import contextlib
import contextvars
import ctypes
import gc
import os
import pathlib
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

from t5x_cpm.config import ConfigError

# glibc's names for the first argument of mallopt().
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX, M_ARENA_MAX = -1, -2, -4, -8
# Files of the drivers of accelerators: NVIDIA's, AMD's, and those of two generations of TPUs.
ACCELERATORS = '/dev/nvidia0', '/dev/kfd', '/dev/accel0', '/dev/vfio/0'
EXTRAS = {'cuda': 'gpu', 'gpu': 'gpu', 'tpu': 'tpu'}  # part of JAX_PLATFORMS -> the extra of setup.py that brings it
# Lines that the logs of XLA, libtpu and TensorFlow write, of any severity but fatal; and what announces the first of them.
LOG_LINE = (r'^([IWE][0-9]{4} [0-9:.]+ +[0-9]+ [^ ]+:[0-9]+\]|[0-9-]{10} [0-9:.]+: [IWE] [^ ]+:[0-9]+\]|'
            r'WARNING: (All log messages before absl::|Logging before InitGoogle)|=== Source Location Trace: ===|'
            r'learning/[^ ]+\.cc:[0-9]+$|Failed to find host bounds for accelerator type: )')

_compiling_for: contextvars.ContextVar[str] = contextvars.ContextVar('_compiling_for', default='')


@contextlib.contextmanager
def compiling_for(platform: str) -> Iterator[None]:
  """Within the block, programs are built for `platform` instead of the platform that JAX runs on."""
  token = _compiling_for.set(platform)
  try:
    yield
  finally:
    _compiling_for.reset(token)


def _platform() -> str:
  import jax

  return _compiling_for.get() or jax.default_backend()


def on_cpu() -> bool:
  """Whether computations run on the CPU."""
  return _platform() == 'cpu'


def devices(local: bool = False) -> list[Any]:
  """The devices that JAX runs on; `local`: those of this process.

  Raises:
    ConfigError: JAX cannot start on the platform that JAX_PLATFORMS names.
  """
  import jax

  try:
    return jax.local_devices() if local else jax.devices()
  except (RuntimeError, AssertionError) as error:  # without its plugin, CUDA fails with an assertion that says nothing
    wanted = os.environ.get('JAX_PLATFORMS') or ''
    extra = next((extra for part, extra in EXTRAS.items() if part in wanted), '')
    reason = str(error).strip().partition('\n')[0] or 'JAX was installed without it'
    advice = f"install the extra, pip install -e '.[{extra}]', on a machine that has one, or " if extra else ''
    raise ConfigError(f'JAX_PLATFORMS={wanted}: JAX cannot start there ({reason}): {advice}set JAX_PLATFORMS=cpu.') from error


def free_memory() -> int:
  """Bytes of memory that this process may still take, by what the system and its control group say."""
  free = [os.sysconf('SC_AVPHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')]
  with contextlib.suppress(OSError, ValueError, IndexError):
    found = pathlib.Path('/proc/meminfo').read_text().split('MemAvailable:')[1].split()[0]
    free = [int(found) * 1024]  # with what the system's cache gives up
  with contextlib.suppress(OSError, ValueError):
    group = pathlib.Path('/sys/fs/cgroup')
    free.append(int((group / 'memory.max').read_text()) - int((group / 'memory.current').read_text()))
  return min(free)


def give_back_memory() -> None:
  """Returns what the process has freed to the system.

  Otherwise glibc keeps what the threads of TensorStore have freed: copying tables of 126 MiB, a process grew by 116 with each.
  Its futures refer to themselves and to what they wrote, so that they are only freed when garbage is collected.
  """
  with contextlib.suppress(OSError, AttributeError):  # another C library
    gc.collect()
    ctypes.CDLL('libc.so.6').malloc_trim(0)


def keep_memory() -> None:
  """Makes a process on the CPU reuse the memory of one step for the next.

  XLA:CPU allocates the temporaries of a program, often hundreds of MB, anew for each execution. glibc would return them to the
  kernel each time, and the kernel would have to clear every page again: measured at 14 % of the CPU time of a training step.
  The price is that the process never shrinks from its peak. (Huge pages save as much while memory is plentiful, but cost more
  where the kernel must compact it first.)

  XLA:CPU frees them a little after the program's results are ready. By then, a program dispatched ahead has allocated memory of
  its own: training at 3.1 GB grew to 7.5 GB. So asynchronous dispatch, which gains nothing on a CPU, is switched off.

  Call it only in a process that belongs to t5x_cpm alone, before JAX makes its client. It does nothing with another C library,
  or where JAX will use an accelerator: JAX_PLATFORMS says so, or says nothing and the machine has one.
  """
  platforms = os.environ.get('JAX_PLATFORMS')
  if platforms != 'cpu' and (platforms or any(map(os.path.exists, ACCELERATORS))):
    return
  try:
    mallopt = ctypes.CDLL('libc.so.6').mallopt
  except (OSError, AttributeError):
    return
  mallopt(M_ARENA_MAX, 1)  # all threads share one heap, so that one can reuse what another frees
  mallopt(M_MMAP_MAX, 0)  # large blocks come from the heap too
  mallopt(M_TRIM_THRESHOLD, -1)  # never give back: the temporaries of a step are a single block, easily above 2 GB
  mallopt(M_TOP_PAD, 64 * 2**20)
  import jax

  jax.config.update('jax_cpu_enable_async_dispatch', False)


def compiler_options(deterministic: bool) -> dict[str, bool] | None:
  """XLA's options for the programs of training.

  On GPUs, some kernels add in the order in which their threads finish, and XLA times several kernels to choose the fastest.
  Both are switched off where runs must be the same bit for bit; TPUs and CPUs need no option for that.
  """
  return {'xla_gpu_deterministic_ops': True} if deterministic and _platform() in ('gpu', 'cuda') else None


def is_verbose() -> bool:
  """Whether the user wants to see what C++ code logs."""
  return os.environ.get('T5X_CPM_VERBOSE') == '1'


def hide_logs() -> None:
  """Keeps XLA and TensorFlow from logging anything but what they die of. Call it before either is imported.

  A user's own TF_CPP_MIN_LOG_LEVEL is respected. Errors of theirs that matter are raised as exceptions of Python too.
  """
  if not is_verbose():
    os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')


def _end(keeper: subprocess.Popen) -> None:
  """Waits until a filter has written all; not for a process that was started in its block and goes on."""
  if keeper.stdin:
    keeper.stdin.close()
  with contextlib.suppress(subprocess.TimeoutExpired):
    keeper.wait(1)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
  """Takes log lines of C++ code out of what is written to the terminal in the block.

  What libtpu and TensorFlow log while they are loaded, such as that they find no device, no variable switches off. The filter
  is a process of its own, so that whatever else is written arrives, the last words of a crash included.
  """
  with contextlib.ExitStack() as stack:
    if not is_verbose():
      with contextlib.suppress(OSError):  # no grep, or no terminal to keep clean
        saved = os.dup(2)
        stack.callback(os.close, saved)
        command = ['grep', '-a', '-v', '-E', '--line-buffered', LOG_LINE]
        keeper = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=saved, stderr=subprocess.DEVNULL,
                                  env=os.environ | {'LC_ALL': 'C'})
        assert keeper.stdin
        stack.callback(_end, keeper)
        os.dup2(keeper.stdin.fileno(), 2)
        stack.callback(os.dup2, saved, 2)
        stack.callback(sys.stderr.flush)
    yield


def use_cpu_devices(count: int, processes: int = 1) -> None:
  """Starts JAX, on the CPU as `count` devices, so that a mesh can be tried on any machine; 0: on the devices that are there.

  Raises:
    ConfigError: JAX has already started with other devices or cannot start, or the processes cannot share so many evenly.
  """
  if not count:
    with quiet():  # libtpu complains where there is no TPU
      devices(local=True)
    return
  if count % processes:
    raise ConfigError(f'MeshConfig.cpu_devices = {count}: {processes} processes cannot have the same number each.')
  count //= processes
  import jax

  with contextlib.suppress(RuntimeError):  # JAX has started already: its devices are checked below
    jax.config.update('jax_platforms', 'cpu')
    jax.config.update('jax_num_cpu_devices', count)
  if not on_cpu() or jax.local_device_count() != count:
    raise ConfigError(
        f'MeshConfig.cpu_devices needs {count}, but JAX has started with {jax.local_device_count()} {jax.default_backend()} '
        'devices: set it before anything runs, in a new process.')


def keep_compiled_programs() -> None:
  """Stores compiled programs in $T5X_CPM_CACHE/xla (default ~/.cache/t5x_cpm/xla), so that a second start is fast.

  A user's own JAX_COMPILATION_CACHE_DIR is respected.
  """
  import jax

  if not jax.config.jax_compilation_cache_dir:  # type: ignore[attr-defined]
    root = pathlib.Path(os.environ.get('T5X_CPM_CACHE', '~/.cache/t5x_cpm')).expanduser()
    jax.config.update('jax_compilation_cache_dir', str(root / 'xla'))
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.5)
