"""Starting JAX as one of several processes: where this one stands is read from its environment or from flags."""

import contextlib
import dataclasses
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator

from t5x_cpm.cluster.group import BEAT, Group, ProcessError, join
from t5x_cpm.config import ProcessesConfig

SECONDS_TO_CONNECT = 120  # JAX, once all have come; and to part at the end


@dataclasses.dataclass(frozen=True)
class Place:
  """Where a process stands among those of its run."""

  coordinator: str  # host:port of process 0
  count: int
  index: int
  local_devices: tuple[int, ...] | None = None  # GPUs of the host that are this process's; None is all

  @property
  def address(self) -> tuple[str, int]:
    host, _, port = self.coordinator.rpartition(':')
    return host.strip('[]'), int(port)


def _number(name: str, text: str) -> int | None:
  if text and not text.isdigit():
    raise ProcessError(f'{name}={text}: expected a number.')
  return int(text) if text else None


def find_place(coordinator: str = '', num_processes: str = '', process_id: str = '') -> Place | None:
  """Where this process stands, by flags and, for what they leave out, by SLURM, Open MPI or the TPU's metadata (GCE, GKE).

  Args:
    coordinator, num_processes, process_id: flags, '' where not given. The port of the coordinator must be free on its host.

  Returns:
    None for a process alone.

  Raises:
    ProcessError: flags and environment contradict each other, or together do not say all.
  """
  count, index = _number('--num_processes', num_processes), _number('--process_id', process_id)
  place, launcher = (None, '') if coordinator and num_processes and process_id else _launched(coordinator or None)
  if place is not None:
    for flag, given, found in (('--num_processes', count, place.count), ('--process_id', index, place.index)):
      if given not in (None, found):
        raise ProcessError(f'{flag}={given}, but {launcher} says {found}: leave the flag out, or start that many.')
    return place if place.count > 1 else None
  given_flags = {'--coordinator': coordinator, '--num_processes': num_processes, '--process_id': process_id}
  missing = [flag for flag, value in given_flags.items() if not value]
  if len(missing) == 3 or count == 1:
    return None
  if missing:
    raise ProcessError(
        f'{", ".join(flag for flag in given_flags if flag not in missing)} without {" and ".join(missing)}: nothing in the '
        'environment says what they are. Every process needs all three, as in --coordinator=HOST:PORT --num_processes=2 '
        '--process_id=0.')
  assert count is not None and index is not None
  if not coordinator.rpartition(':')[0] or not coordinator.rpartition(':')[2].isdigit():
    raise ProcessError(f'--coordinator={coordinator}: expected HOST:PORT, a host that all processes reach and its free port.')
  if index >= count:
    raise ProcessError(f'--process_id={index}: expected a number below --num_processes={count}; the first is 0.')
  return Place(coordinator, count, index)


def _launched(coordinator: str | None) -> tuple[Place | None, str]:
  """What the launcher of this process says, and its name. (None, '') where none is known."""
  if int(os.environ.get('OMPI_COMM_WORLD_SIZE', 1)) > 1 and 'OMPI_MCA_orte_hnp_uri' not in os.environ and not coordinator:
    raise ProcessError('Open MPI 5 does not say where process 0 is: give --coordinator=HOST:PORT, HOST being the first host.')
  if 'OMPI_COMM_WORLD_SIZE' in os.environ and coordinator:  # of any version
    values = [int(os.environ[f'OMPI_COMM_WORLD_{name}']) for name in ('SIZE', 'RANK', 'LOCAL_RANK')]
    return Place(coordinator, values[0], values[1], (values[2],)), 'Open MPI'
  # jax.distributed.initialize() would find the same, but only while it connects, which without all others is for ever.
  from jax._src.clusters import ClusterEnv

  try:
    with warnings.catch_warnings():
      warnings.simplefilter('ignore')  # in a pod without the package kubernetes: flags serve there
      found, count, index, devices = ClusterEnv.auto_detect_unset_distributed_params(
          coordinator, None, None, None, None, SECONDS_TO_CONNECT)
  except (RuntimeError, OSError, KeyError, ValueError) as error:
    raise ProcessError(f'the environment looks like that of a cluster, but does not say where this process stands: {error}. '
                       'Give --coordinator, --num_processes and --process_id.') from error
  if found is None or count is None or index is None:
    return None, ''
  launcher = 'SLURM' if 'SLURM_PROCID' in os.environ else 'the environment'
  return Place(found, count, index, tuple(devices) if devices else None), launcher


@contextlib.contextmanager
def together(
    place: Place | None, config: ProcessesConfig, settings: list[str], tell: Callable[[BaseException], int]) -> Iterator[Group]:
  """Runs a block in all processes, or in none: when one fails or is lost, all end. Before the block, JAX is started.

  Args:
    place: of this process; None: alone.
    config: how long to wait for what.
    settings: lines that must be the same in all.
    tell: prints an error of the block and returns its exit code, or raises it. Only among several: the process ends here,
      because its usual end would wait for the others.

  Raises:
    ProcessError: the processes did not come together.
  """
  if place is None:
    yield Group()
    return
  group = join(place.count, place.index, place.address, config, settings)
  try:
    import jax

    jax.distributed.initialize(
        place.coordinator, place.count, place.index, local_device_ids=place.local_devices,
        cluster_detection_method='deactivate', initialization_timeout=SECONDS_TO_CONNECT,
        # `watch` stops all earlier, and says why.
        heartbeat_timeout_seconds=round(2 * config.silent_seconds) + SECONDS_TO_CONNECT,
        shutdown_timeout_seconds=SECONDS_TO_CONNECT)
    yield group
  except BaseException as error:
    if type(error).__module__.startswith('jax'):  # a collective that failed: most likely because another process is gone,
      time.sleep(3 * BEAT)  # which `watch` then tells, and ends this one
    group.fail(str(error) or type(error).__name__)
    try:
      code = tell(error)
    except BaseException:
      traceback.print_exc()
      code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
  group.close()
