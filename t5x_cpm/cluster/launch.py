"""Starting JAX as one of several processes. Flags or the environment say which of them this process is."""

import contextlib
import dataclasses
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator

from t5x_cpm.cluster import secret as secret_lib
from t5x_cpm.cluster.connection import BEAT
from t5x_cpm.cluster.group import Group, ProcessError
from t5x_cpm.cluster.hub import Hub
from t5x_cpm.cluster.secret import Secret
from t5x_cpm.cluster.spoke import Spoke
from t5x_cpm.config import ProcessesConfig
from t5x_cpm.config.fields import as_count, one_line

SECONDS_TO_CONNECT = 120  # what JAX may take to connect once all have come, and to disconnect at the end


@dataclasses.dataclass(frozen=True)
class Member:
  """Which of the processes of a run this one is."""

  coordinator: str  # host:port of process 0
  count: int  # how many processes there are
  index: int  # which of them this one is
  local_devices: tuple[int, ...] | None = None  # the GPUs of the host that this process uses; None is all

  @property
  def address(self) -> tuple[str, int]:
    host, _, port = self.coordinator.rpartition(':')
    return host.strip('[]'), int(port)


def _number(name: str, text: str) -> int | None:
  number = as_count(text)
  if text and number is None:
    raise ProcessError(f'{name}={one_line(text)}: expected a number.')
  return number


def _launched(coordinator: str | None) -> tuple[Member | None, str]:
  """What the launcher of this process says, and the name of the launcher. (None, '') if there is none that we know."""
  if int(os.environ.get('OMPI_COMM_WORLD_SIZE', 1)) > 1 and 'OMPI_MCA_orte_hnp_uri' not in os.environ and not coordinator:
    raise ProcessError('Open MPI 5 does not say where process 0 is: give --coordinator=HOST:PORT, HOST being the first host.')
  if 'OMPI_COMM_WORLD_SIZE' in os.environ and coordinator:  # Open MPI of any version
    values = [int(os.environ[f'OMPI_COMM_WORLD_{name}']) for name in ('SIZE', 'RANK', 'LOCAL_RANK')]
    return Member(coordinator, values[0], values[1], (values[2],)), 'Open MPI'
  # jax.distributed.initialize() would find the same, but only while it connects, which takes forever if one is missing.
  from jax._src.clusters import ClusterEnv

  try:
    with warnings.catch_warnings():
      warnings.simplefilter('ignore')  # JAX warns in a pod without the package kubernetes, where flags serve
      found, count, index, devices = ClusterEnv.auto_detect_unset_distributed_params(
          coordinator, None, None, None, None, SECONDS_TO_CONNECT)
  except (RuntimeError, OSError, KeyError, ValueError) as error:
    raise ProcessError(f'the environment looks like that of a cluster, but does not say where this process stands: {error}. '
                       'Give --coordinator, --num_processes and --process_id.') from error
  if found is None or count is None or index is None:
    return None, ''
  launcher = 'SLURM' if 'SLURM_PROCID' in os.environ else 'the environment'
  return Member(found, count, index, tuple(devices) if devices else None), launcher


def find_member(coordinator: str = '', num_processes: str = '', process_id: str = '') -> Member | None:
  """Finds out which process this is: from flags and, for what they leave out, SLURM, Open MPI or the TPU's metadata (GCE, GKE).

  Args:
    coordinator, num_processes, process_id: the flags, '' where not given. The port of the coordinator must be free on its
      host.

  Returns:
    Which member of the group this process is; None if it is alone.

  Raises:
    ProcessError: flags and environment contradict each other, or leave something unsaid.
  """
  count, index = _number('--num_processes', num_processes), _number('--process_id', process_id)
  member, launcher = (None, '') if coordinator and num_processes and process_id else _launched(coordinator or None)
  if member is not None:
    for flag, given, found in (('--num_processes', count, member.count), ('--process_id', index, member.index)):
      if given not in (None, found):
        raise ProcessError(f'{flag}={given}, but {launcher} says {found}: leave the flag out, or start that many.')
    return member if member.count > 1 else None
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
  if not coordinator.rpartition(':')[0] or as_count(coordinator.rpartition(':')[2]) is None:
    raise ProcessError(f'--coordinator={one_line(coordinator)}: expected HOST:PORT, a host that all processes reach and its '
                       'free port.')
  if index >= count:
    raise ProcessError(f'--process_id={index}: expected a number below --num_processes={count}; the first is 0.')
  return Member(coordinator, count, index)


def join(member: Member, config: ProcessesConfig, settings: list[str], secret: Secret) -> Group:
  """Waits until all processes have come, and watches over them from then on.

  Args:
    member: which process this is; process 0 listens at `member.address` until all have come.
    config: how long to wait, and for what.
    settings: lines that must be the same in all processes, such as the configuration.
    secret: what all must know; nothing is told to a process that does not.

  Raises:
    ProcessError: some did not come in time, two have one index, or counts, settings or secrets differ.
  """
  group = (Hub(member.count, config, member.address, settings, secret) if member.index == 0 else
           Spoke(member.count, member.index, config, member.address, settings, secret))
  group.gather()
  return group


@contextlib.contextmanager
def together(
    member: Member | None, config: ProcessesConfig, settings: list[str], model_dir: str,
    tell: Callable[[BaseException], int]) -> Iterator[Group]:
  """Starts JAX and runs a block in all processes, or in none: when one fails or is lost, all end.

  Args:
    member: which process this is; None if it is alone, and then nothing is started.
    config: how long to wait, and for what.
    settings: lines that must be the same in all processes.
    model_dir: the folder that all processes share, where their secret lies.
    tell: prints an error of the block and returns the exit code, or raises the error. It is called only if there are several
      processes. The process ends right after it, because its usual end would wait for the others.

  Raises:
    ProcessError: the processes did not come together.
  """
  if member is None:
    yield Group()
    return
  group = join(member, config, settings, secret_lib.find(model_dir, member.index, config))
  try:
    import jax

    jax.distributed.initialize(
        member.coordinator, member.count, member.index, local_device_ids=member.local_devices,
        cluster_detection_method='deactivate', initialization_timeout=SECONDS_TO_CONNECT,
        coordinator_bind_address=os.environ.get('JAX_COORDINATOR_BIND_ADDRESS', group.listens_at),
        # The watch stops all processes earlier than JAX would, and says why.
        heartbeat_timeout_seconds=round(2 * config.silent_seconds) + SECONDS_TO_CONNECT,
        shutdown_timeout_seconds=SECONDS_TO_CONNECT)
    yield group
  except BaseException as error:
    if type(error).__module__.startswith('jax'):
      # A collective has failed, most likely because another process is gone. The watch will say so, and end this one.
      time.sleep(3 * BEAT)
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
