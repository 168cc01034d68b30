"""Several processes: where each stands, how they come together, and what stops them."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest
from hostile import OTHER, SECRET, insult
from small_training import ROOT, command, environment, losses, wait_for_step, write_run

from t5x_cpm import backend, tuning
from t5x_cpm.cluster import group, launch
from t5x_cpm.cluster import secret as secret_lib
from t5x_cpm.config import ConfigError

SLURM = {'SLURM_JOB_ID': '4242', 'SLURM_STEP_NODELIST': 'node[003-006]', 'SLURM_NTASKS': '4', 'SLURM_PROCID': '2',
         'SLURM_LOCALID': '0'}
OPEN_MPI = {'OMPI_COMM_WORLD_SIZE': '2', 'OMPI_COMM_WORLD_RANK': '1', 'OMPI_COMM_WORLD_LOCAL_RANK': '1'}
OPEN_MPI_4 = OPEN_MPI | {'OMPI_MCA_orte_hnp_uri': '1531576320.0;tcp://10.96.0.1,10.148.0.1:34911'}
TPU = {'TPU_WORKER_HOSTNAMES': '127.0.0.1,10.0.0.2', 'TPU_WORKER_ID': '1', 'MEGASCALE_COORDINATOR_ADDRESS': '',
       'MEGASCALE_NUM_SLICES': '', 'MEGASCALE_SLICE_ID': '', 'TPU_SKIP_MDS_QUERY': '1'}  # as GKE has it
FLAGS = ('10.0.0.1:1234', '2', '1')


def free_port() -> int:
  with socket.socket() as probe:
    probe.bind(('', 0))
    return probe.getsockname()[1]


def connect(port: int) -> socket.socket:
  """A connection to a port where somebody will soon listen."""
  deadline = time.monotonic() + 30
  while True:
    try:
      return socket.create_connection(('127.0.0.1', port))
    except OSError:
      assert time.monotonic() < deadline
      time.sleep(0.1)


@pytest.fixture
def launcher(monkeypatch):
  """Sets the variables of a launcher, and none of another."""
  for name in list(os.environ):
    if name.startswith(('SLURM_', 'OMPI_', 'TPU_', 'MEGASCALE_', 'KUBERNETES_')):
      monkeypatch.delenv(name)

  def use(variables):
    if 'TPU_WORKER_ID' in variables:
      monkeypatch.setattr('jax._src.clusters.cloud_tpu_cluster.running_in_cloud_tpu_vm', True)
    for name, value in variables.items():
      monkeypatch.setenv(name, value)

  return use


@pytest.mark.parametrize('variables, flags, member', [
    ({}, (), None),
    ({}, ('', '1', ''), None),
    ({}, FLAGS, launch.Member('10.0.0.1:1234', 2, 1)),
    (SLURM, (), launch.Member(f'node003:{4242 % 4096 + 61440}', 4, 2, (0,))),
    (SLURM, ('', '4', ''), launch.Member(f'node003:{4242 % 4096 + 61440}', 4, 2, (0,))),
    (SLURM | {'SLURM_NTASKS': '1', 'SLURM_PROCID': '0'}, (), None),
    (OPEN_MPI_4, (), launch.Member(f'10.96.0.1:{1531576320 // 4096 % 4096 + 61440}', 2, 1, (1,))),
    (OPEN_MPI, ('10.0.0.1:1234',), launch.Member('10.0.0.1:1234', 2, 1, (1,))),
    (TPU, (), launch.Member('127.0.0.1:8482', 2, 1)),
    ({'KUBERNETES_SERVICE_HOST': '10.0.0.1'}, (), None),  # a pod like any other
])
def test_a_process_finds_out_which_it_is(launcher, variables, flags, member):
  launcher(variables)
  assert launch.find_member(*flags) == member


@pytest.mark.parametrize('variables, flags, words', [
    ({}, ('', '2', '1'), 'without --coordinator'),
    ({}, ('host:1',), 'without --num_processes and --process_id'),
    ({}, ('host', '2', '1'), 'HOST:PORT'),
    ({}, ('host:1', '2', '2'), 'below --num_processes=2'),
    ({}, ('host:1', 'two', '2'), 'expected a number'),
    (SLURM, ('', '3', ''), '--num_processes=3, but SLURM says 4'),
    (OPEN_MPI, (), 'Open MPI 5'),
])
def test_a_place_that_is_not_clear_is_refused(launcher, variables, flags, words):
  launcher(variables)
  with pytest.raises(ConfigError, match=words):
    launch.find_member(*flags)


def test_processes_share_the_devices_of_a_mesh_evenly():
  with pytest.raises(ConfigError, match='3 processes cannot have the same number'):
    backend.use_cpu_devices(8, 3)


class Members:
  """Processes that join and then count steps, without JAX."""

  CODE = '''
    import sys, time
    from t5x_cpm.cluster import launch
    from t5x_cpm.cluster.group import ProcessError
    from t5x_cpm.cluster.secret import Secret
    from t5x_cpm.config import ProcessesConfig
    count, index, port, setting, last, hang_at, start_seconds, secret = sys.argv[1:9]
    config = ProcessesConfig(start_seconds=float(start_seconds), silent_seconds=3, behind_seconds=3)
    try:
      group = launch.join(launch.Member(f'127.0.0.1:{port}', int(count), int(index)), config, ['same', setting],
                          Secret(secret.encode(), 'this test'))
    except ProcessError as error:
      sys.exit(f'refused: {error}')
    for step in range(int(last)):
      group.at(f'step {step}')
      print(step, flush=True)
      time.sleep(60 if step == int(hang_at) else 0.1)
    if len(sys.argv) > 9:
      group.fail(sys.argv[9])
      sys.exit(1)
    group.close()
    '''

  def __init__(self, tmp_path):
    self.port, self.tmp_path, self.started = free_port(), tmp_path, []

  def start(self, count, index, *, setting='a', last=600, hang_at=-1, start_seconds=2, secret=SECRET, failure=()):
    known = secret.value.decode()
    arguments = map(str, (count, index, self.port, setting, last, hang_at, start_seconds, known, *failure))
    number = len(self.started)
    with open(self.tmp_path / f'out{number}', 'w') as out, open(self.tmp_path / f'err{number}', 'w') as err:
      self.started.append(subprocess.Popen(
          [sys.executable, '-c', textwrap.dedent(self.CODE), *arguments], cwd=ROOT, stdout=out, stderr=err))

  def wait_for(self, line):
    deadline = time.monotonic() + 30
    while not all(line in (self.tmp_path / f'out{i}').read_text().split() for i in range(len(self.started))):
      assert time.monotonic() < deadline, self.ends(0)
      time.sleep(0.05)

  def ends(self, seconds):
    """(exit code, error output) of each; None for one that goes on."""
    deadline, ends = time.monotonic() + seconds, []
    for number, process in enumerate(self.started):
      with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(max(deadline - time.monotonic(), 0))
      ends.append((process.poll(), (self.tmp_path / f'err{number}').read_text()))
    return ends


@pytest.fixture
def members(tmp_path):
  result = Members(tmp_path)
  yield result
  for process in result.started:
    process.kill()
    process.wait()


def test_processes_that_end_in_turn_are_not_missed(members):
  members.start(3, 0, last=1)
  members.start(3, 1, last=40)
  members.start(3, 2, last=20)
  assert members.ends(20) == [(0, '')] * 3


@pytest.mark.parametrize('starts, words', [
    ([(3, 0), (3, 2)], 'process 1 of 3 did not come within 2 s'),
    ([(2, 1)], 'process 0 at .* did not come within 2 s'),
    ([(2, 0), (3, 1)], 'process 0 was started as one of 2 processes, process 1 on .* as one of 3'),
    ([(3, 0), (3, 1), (3, 1)], 'has the index of|was there before'),
    ([(2, 0), (2, 1, 'b')], 'process 1 on .* was started with another configuration than process 0: it has b'),
])
def test_processes_that_do_not_belong_together_are_all_told(members, starts, words):
  for count, index, *setting in starts:
    members.start(count, index, setting=setting[0] if setting else 'a')
  for code, text in members.ends(15):
    assert code == 1 and text.startswith('refused: ') and re.search(words, text), text


@pytest.mark.parametrize('beats, code, words', [
    (6, 0, ''), (0, 1, 'has not answered for 3 s'), (2, 1, 'has not answered for 3 s')])
def test_a_process_waits_as_long_as_process_0_gathers(members, beats, code, words):
  """Longer than it would wait for process 0 to appear; the test is process 0."""
  with socket.create_server(('127.0.0.1', members.port)) as server:
    members.start(2, 1, last=1)
    server.settimeout(30)
    connection, _ = server.accept()
    with connection, connection.makefile() as lines:
      if beats:
        connection.sendall(b'{"challenge": "who"}\n')
        theirs = json.loads(next(lines))['challenge']
        answer = SECRET.answer(secret_lib.LISTENER, 'who', theirs)
        connection.sendall(json.dumps({'answer': answer}).encode() + b'\n')
        assert json.loads(next(lines))['settings'] == ['same', 'a']
      for _ in range(beats):
        time.sleep(1)
        connection.sendall(b'{"beat": true}\n')
      if not code:
        connection.sendall(b'{"go": true}\n')
        members.wait_for('0')
        connection.sendall(b'{"bye": true}\n')
      (got, text), = members.ends(10)
  assert got == code and words in text, text


def test_process_0_gives_signs_of_life_and_names_who_leaves_before_all_are_there(members):
  """The test is process 1."""
  members.start(4, 2, start_seconds=60)
  members.start(4, 0, start_seconds=60)
  with connect(members.port) as connection, connection.makefile() as lines:
    theirs = json.loads(next(lines))['challenge']
    for message in ({'challenge': 'who', 'answer': SECRET.answer(secret_lib.COMER, theirs, 'who')},
                    {'hello': 1, 'count': 4, 'host': 'there', 'settings': ['same', 'a']}):
      connection.sendall(json.dumps(message).encode() + b'\n')
    assert json.loads(next(lines)) == {'answer': SECRET.answer(secret_lib.LISTENER, theirs, 'who')}
    assert [json.loads(next(lines)) for _ in range(3)] == 3 * [{'beat': True}]
  for code, text in members.ends(10):
    assert code == 1 and 'process 1 on there came, and ended before all were there' in text, text


def test_strangers_at_the_port_end_nothing_while_processes_gather_and_work(members):
  members.start(2, 0, last=30, start_seconds=60)
  connect(members.port).close()
  heard = insult(members.port)
  assert heard and b'same' not in heard and members.ends(0) == [(None, '')]
  members.start(2, 1, last=30)
  members.wait_for('2')
  insult(members.port)  # where nobody listens any more; in a run with JAX it is JAX that does
  assert members.ends(20) == [(0, '')] * 2


def test_a_process_without_the_secret_is_told_so_and_the_others_go_on(members):
  members.start(2, 0, last=1, start_seconds=60)
  members.start(2, 1, last=1, secret=OTHER)
  (_, _), (code, text) = members.ends(5)
  assert code == 1 and 'has another secret than this process' in text
  members.started.pop()
  members.start(2, 1, last=1)
  assert members.ends(20) == [(0, '')] * 2


def test_a_port_in_use_is_told(members):
  with socket.create_server(('', members.port)):
    members.start(2, 0)
    (code, text), = members.ends(10)
  assert code == 1 and f'cannot listen on port {members.port}' in text


@pytest.mark.parametrize('victim', [0, 1])
@pytest.mark.parametrize('number, words, seconds', [
    (signal.SIGKILL, 'ended( at the start| at step [0-9]+)? without a word', 3),
    (signal.SIGSTOP, 'has not answered for 3 s', 8)])
def test_the_loss_of_a_process_ends_the_others_with_its_name(members, victim, number, words, seconds):
  for index in range(3):
    members.start(3, index)
  members.wait_for('3')
  members.started[victim].send_signal(number)
  ends = members.ends(seconds)
  for index, (code, text) in enumerate(ends):
    if index != victim:
      assert code == group.LOST and re.search(f'process {victim}.* {words}', text), ends


def test_a_process_that_hangs_is_named(members):
  members.start(2, 0, last=9, hang_at=8)  # the others wait for it, as in a collective
  members.start(2, 1, last=9, hang_at=5)
  for code, text in members.ends(12):
    assert code == group.LOST and 'process 1' in text and 'hangs at step 5: the others have been at step 8' in text


@pytest.mark.parametrize('index', [0, 1])
def test_an_error_of_one_is_told_by_all(members, index):
  for other in range(2):
    members.start(2, other, last=3 if other == index else 600, failure=['the disk is full'] if other == index else [])
  ends = members.ends(8)
  assert [code for code, _ in ends] == [1 if other == index else group.LOST for other in range(2)]
  assert f'process {index} on' in ends[1 - index][1] and 'stopped: the disk is full' in ends[1 - index][1]


def start_all(folder, name, steps, count, *extra):
  """The processes of a run on eight devices, with the places of their output."""
  port = free_port()
  started = []
  for index in range(count):
    place = [f'--coordinator=127.0.0.1:{port}', f'--num_processes={count}', f'--process_id={index}'] if count > 1 else []
    with open(folder / f'{name}.out{index}', 'w') as out, open(folder / f'{name}.err{index}', 'w') as err:
      started.append(subprocess.Popen(
          command(folder, name, steps, '--gin.MeshConfig.cpu_devices=8', '--gin.MeshConfig.data=2', '--gin.MeshConfig.model=2',
                  '--gin.MeshConfig.expert=2', *place, *extra), cwd=ROOT, env=environment(folder), stdout=out, stderr=err))
  return started


def finish(folder, name, started, seconds=240):
  deadline = time.monotonic() + seconds
  for index, process in enumerate(started):
    process.wait(max(deadline - time.monotonic(), 1))
    assert process.returncode == 0, (folder / f'{name}.err{index}').read_text()[-3000:]


STEPS = 40  # more than a run takes until it is stopped three times


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """A run with experts on eight devices, and what one process makes of it."""
  path = tmp_path_factory.mktemp('processes')
  write_run(path)
  with open(path / 'run.gin', 'a') as file:
    file.write("MoEConfig.num_experts = 4\nMoEConfig.dispatch = 'dropless'\nMeshConfig.sharding = 'full'\n"
               'CheckpointConfig.every = 4\nTrainConfig.batch_size = 8\n')
  finish(path, 'one', start_all(path, 'one', STEPS, 1))
  return path


@pytest.mark.slow
@pytest.mark.xdist_group('processes')
def test_any_number_of_processes_trains_the_same_whatever_they_lose(folder):
  """2 processes, at whose port strangers come and of which one gets SIGTERM; 2, of which one is killed; 4; then 1."""
  run = folder / 'many'
  started = start_all(folder, 'many', STEPS, 2)
  port = int(next(word for word in started[0].args if word.startswith('--coordinator=')).rpartition(':')[2])
  connect(port).close()
  deadline = time.monotonic() + 300
  while not (run / 'metrics.jsonl').exists() or len(losses(folder, 'many')) < 3:
    assert started[0].poll() is None and time.monotonic() < deadline, (folder / 'many.err0').read_text()
    insult(port)  # from the time when process 0 waits; JAX listens there while the run trains
    time.sleep(0.2)
  assert (run / '.processes_secret').stat().st_mode & 0o777 == 0o600
  started[1].send_signal(signal.SIGTERM)  # one alone is told: both save the same step and end
  assert [process.wait(60) for process in started] == [0, 0] and 'SIGTERM at step' in (folder / 'many.out0').read_text()
  done = len(losses(folder, 'many'))

  started = start_all(folder, 'many', STEPS, 2)
  wait_for_step(folder, 'many', done + 5, started[0])  # a checkpoint later, which is written in the background
  started[1].send_signal(signal.SIGKILL)
  assert [process.wait(60) for process in started] == [group.LOST, -signal.SIGKILL]
  assert 'process 1 on' in (folder / 'many.err0').read_text()
  assert f'continuing {run} from step {done}' in (folder / 'many.out0').read_text()

  done = len(losses(folder, 'many'))
  for steps, count in ((done + 3, 4), (done + 5, 1)):
    finish(folder, 'many', start_all(folder, 'many', steps, count))
    assert f'continuing {run} from step' in (folder / 'many.out0').read_text()
  expected, got = losses(folder, 'one'), losses(folder, 'many')
  assert set(got) == set(range(1, done + 6)) <= set(expected)
  assert got == pytest.approx({step: expected[step] for step in got}, rel=1e-5)
  assert (run / 'loss.png').exists()


@pytest.mark.slow
@pytest.mark.xdist_group('processes')
def test_two_processes_train_the_same_delta_as_one_and_write_it_once(folder):
  """Of pairs, with checkpoints ranked by answers."""
  (folder / 'pairs.jsonl').write_text(''.join(
      json.dumps({'inputs': f'{i} + 1', 'targets': str(i + 1)}) + '\n' for i in range(40)))
  more = (f'--base={folder / "one"}', '--gin.DeltaConfig.method=lora', '--gin.TaskConfig.objective=pairs',
          f'--gin.LocalTaskConfig.files={folder / "pairs.jsonl"}', '--gin.CheckpointConfig.keep_best=1',
          '--gin.CheckpointConfig.best_metric=eval/char_f1', '--gin.CheckpointConfig.best_mode=max',
          '--gin.DecodeConfig.max_new_tokens=4')
  for name, count in (('delta_one', 1), ('delta_two', 2)):
    finish(folder, name, start_all(folder, name, 6, count, *more))
  assert losses(folder, 'delta_two') == pytest.approx(losses(folder, 'delta_one'), rel=1e-5)
  one, two = (tuning.read(folder / name) for name in ('delta_one', 'delta_two'))
  assert sorted(file.name for file in (folder / 'delta_two' / 'delta').iterdir()) == ['delta.json', 'weights-6.safetensors']
  assert one.about['base'] == two.about['base'] and one.tensors.keys() == two.tensors.keys()
  for name, value in one.tensors.items():
    np.testing.assert_allclose(two.tensors[name], value, atol=1e-5)
  assert two.about['metrics'] == pytest.approx(one.about['metrics'], rel=1e-4) and 'eval/char_f1' in two.about['metrics']
  told = [(folder / f'delta_two.out{index}').read_text() for index in range(2)]
  assert ['parameters are trained' in text for text in told] == [True, False]


@pytest.mark.slow
@pytest.mark.xdist_group('processes')
def test_bad_input_ends_all_processes(folder):
  started = start_all(folder, 'refused', 5, 2, '--gin.ModelConfig.vocab_size=100')
  assert all(process.wait(60) in (2, group.LOST) for process in started)
  assert 'set ModelConfig.vocab_size' in (folder / 'refused.err0').read_text()
