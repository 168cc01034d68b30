"""The port of process 0 and the secret: what strangers send ends their connection, and nothing else."""

import json
import os
import socket
import threading
import time

import pytest
from hostile import HELLO, HOSTILE, OTHER, SECRET, as_line, insult
from hypothesis import given, settings
from hypothesis import strategies as st

from t5x_cpm.cluster import door as door_lib
from t5x_cpm.cluster import secret as secret_lib
from t5x_cpm.cluster.door import Door
from t5x_cpm.cluster.group import ProcessError
from t5x_cpm.cluster.secret import Secret
from t5x_cpm.cluster.spoke import Spoke
from t5x_cpm.config import ProcessesConfig


@pytest.fixture
def door():
  made = Door('127.0.0.1', 0, SECRET)
  yield made
  made.close()


def port_of(made: Door) -> int:
  return int(made.address.rpartition(':')[2])


def poll_until(made: Door, done: threading.Event | threading.Thread, greetings: list) -> None:
  deadline = time.monotonic() + 30
  while (done.is_alive() if isinstance(done, threading.Thread) else not done.is_set()) and time.monotonic() < deadline:
    greetings += made.poll(0.01)


def test_strangers_learn_nothing_and_a_process_of_the_run_comes_in(door):
  assert len(HOSTILE) >= 26
  heard, greetings = [], []
  stranger = threading.Thread(target=lambda: heard.append(insult(port_of(door))))
  stranger.start()
  poll_until(door, stranger, greetings)
  assert not greetings and door.turned_away >= len(HOSTILE) and heard[0]
  for line in heard[0].splitlines():
    assert set(json.loads(line)) in ({'challenge'}, {'denied'}), line
  spoke = Spoke(2, 1, ProcessesConfig(), ('127.0.0.1', port_of(door)), ['same', 'a' * 500_000], SECRET)
  comer = threading.Thread(target=lambda: spoke._join().close(), daemon=True)
  comer.start()
  poll_until(door, comer, greetings)
  assert not comer.is_alive()


def shake_hands(made: Door, secret: Secret = SECRET) -> tuple[socket.socket, dict]:
  """A connection, and what the door says to an answer made with `secret`."""
  connection = socket.create_connection(('127.0.0.1', port_of(made)), timeout=5)
  made.poll(1)
  lines = connection.makefile()
  challenge = json.loads(next(lines))['challenge']
  connection.sendall(as_line({'challenge': 'mine', 'answer': secret.answer(secret_lib.COMER, challenge, 'mine')}))
  made.poll(1)
  said = json.loads(next(lines))
  if secret == SECRET:
    assert said == {'answer': SECRET.answer(secret_lib.LISTENER, challenge, 'mine')}
  return connection, said


def test_a_greeting_counts_only_after_the_secret(door):
  with shake_hands(door, OTHER)[0] as stranger:
    assert door.turned_away == 1 and stranger.recv(10) == b''
  connection, _ = shake_hands(door)
  with connection:
    line = as_line(HELLO | {'settings': ['a' * 500_000]})  # now a long line is read
    threading.Thread(target=connection.sendall, args=(line,)).start()
    came = []
    while not came:
      came = door.poll(1)
    assert came[0][0]['settings'] == ['a' * 500_000]


@pytest.mark.parametrize('change', [
    {'hello': '1'}, {'hello': True}, {'hello': None}, {'count': 2.0}, {'host': 3}, {'settings': 'same'}, {'settings': [1]}])
def test_a_malformed_greeting_ends_its_own_connection_even_with_the_secret(door, change):
  connection, _ = shake_hands(door)
  with connection:
    connection.sendall(as_line(HELLO | change))
    assert door.poll(1) == [] and door.turned_away == 1


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(['hello', 'count', 'challenge', 'answer', 'a']), inner),
    max_leaves=8)


@settings(max_examples=150, deadline=None)
@given(greetings=st.lists(st.binary(max_size=200) | JSON.map(as_line), min_size=1, max_size=4))
def test_no_bytes_open_the_door_or_break_it(greetings):
  made = Door('127.0.0.1', 0, SECRET)
  try:
    with socket.create_connection(('127.0.0.1', port_of(made))) as connection:
      assert made.poll(1) == []
      for greeting in greetings:
        connection.sendall(greeting)
      connection.shutdown(socket.SHUT_WR)
      deadline = time.monotonic() + 5
      while not made.turned_away and time.monotonic() < deadline:
        assert made.poll(1) == []
    assert made.turned_away == 1
  except (BrokenPipeError, ConnectionResetError):
    pass  # the door had heard enough before all was sent
  finally:
    made.close()


def test_idle_connections_are_closed_in_time_and_never_crowd_out_a_process(door, monkeypatch):
  monkeypatch.setattr(door_lib, 'MOST_STRANGERS', 20)
  idle = []
  for _ in range(60):
    idle.append(socket.create_connection(('127.0.0.1', port_of(door))))
    door.poll(1)
  assert door.turned_away == 40
  shake_hands(door)[0].close()
  monkeypatch.setattr(door_lib, 'SECONDS_TO_GREET', 0.05)
  time.sleep(0.1)
  door.poll(0)
  assert not door._strangers
  for connection in idle:
    connection.close()


def test_a_stranger_at_the_port_learns_nothing_of_the_configuration():
  """The test is a program that answers where process 0 should be."""
  with socket.create_server(('127.0.0.1', 0)) as server:
    spoke = Spoke(2, 1, ProcessesConfig(start_seconds=1), server.getsockname(), ['the configuration'], SECRET)
    heard = []

    def serve():
      answers = [b'HTTP/1.1 400 Bad Request\r\n\r\n', b'{"challenge": 5}\n', b'{"challenge": "a"}\n{"answer": "b"}\n',
                 b'{"challenge": "a"}\n{"go": true}\n', b'{"go": true}\n', b'5\n', b'a' * 5000]
      while True:
        try:
          connection, _ = server.accept()
        except OSError:
          return
        with connection:
          connection.sendall(answers[len(heard) % len(answers)])
          connection.settimeout(0.2)
          try:
            heard.append(connection.recv(1 << 16) + connection.recv(1 << 16))
          except OSError:
            heard.append(b'')

    threading.Thread(target=serve, daemon=True).start()
    with pytest.raises(ProcessError, match='did not come within 1 s .*not of this run'):
      spoke.gather()
  assert heard and b'configuration' not in b''.join(heard) and SECRET.value not in b''.join(heard)


def test_another_secret_is_told(door):
  spoke = Spoke(2, 1, ProcessesConfig(), ('127.0.0.1', port_of(door)), [], OTHER)
  done = threading.Event()
  listening = threading.Thread(target=poll_until, args=(door, done, []))
  listening.start()
  with pytest.raises(ProcessError, match='has another secret than this process, which has that of a stranger'):
    spoke.gather()
  done.set()
  listening.join()


@pytest.mark.parametrize('host, addresses', [
    ('127.0.0.1', ['127.0.0.1']), ('::1', ['::1']), ('this.name.is.not.there.invalid', [])])
def test_process_0_listens_where_the_others_look_for_it(host, addresses):
  assert door_lib._addresses(host) == addresses


def test_a_name_that_means_loopback_here_alone_is_listened_to_everywhere(monkeypatch):
  found = [(0, 0, 0, '', ('127.0.1.1', 0)), (0, 0, 0, '', ('10.1.2.3', 0))]  # as Debian writes it to /etc/hosts
  monkeypatch.setattr(door_lib.socket, 'getaddrinfo', lambda *_, **__: found[:1])
  assert door_lib._addresses('node003') == [] and door_lib._addresses('127.0.1.1') == ['127.0.1.1']
  monkeypatch.setattr(door_lib.socket, 'getaddrinfo', lambda *_, **__: found)
  assert door_lib._addresses('node003') == ['10.1.2.3']
  with door_lib._listen('node003', 0) as server:  # this machine does not have that address
    assert server.getsockname()[0] in ('::', '0.0.0.0')


def test_the_secret_is_a_file_that_nobody_else_reads(tmp_path, capsys, monkeypatch):
  monkeypatch.delenv(secret_lib.VARIABLE, raising=False)
  config, folder = ProcessesConfig(start_seconds=1), str(tmp_path / 'new' / 'run')
  with pytest.raises(ProcessError, match='did not appear within 1 s .*a folder that all processes share'):
    secret_lib.find(folder, 1, config)
  made = secret_lib.find(folder, 0, config)
  path = tmp_path / 'new' / 'run' / secret_lib.FILE
  assert os.stat(path).st_mode & 0o777 == 0o600 and len(made.value) == 64
  assert secret_lib.find(folder, 1, config) == made == secret_lib.find(folder, 0, config)
  assert [entry.name for entry in path.parent.iterdir()] == [secret_lib.FILE]
  assert not capsys.readouterr().out
  path.chmod(0o644)
  secret_lib.find(folder, 0, config)
  assert 'can be read by others: chmod 600' in capsys.readouterr().out
  for bad in (b'', made.value[:32], bytes(64)):  # cut short, zeros
    path.write_bytes(bad)
    value = secret_lib.find(folder, 0, config).value
    assert value not in (made.value, bad) and len(value) == 64
  path.unlink()
  path.mkdir()
  with pytest.raises(ProcessError, match=r'\.processes_secret, the secret of the processes, cannot be used: Is a directory'):
    secret_lib.find(folder, 0, config)


def test_the_environment_gives_the_secret_instead(tmp_path, monkeypatch):
  monkeypatch.setenv(secret_lib.VARIABLE, 'a' * 32)
  assert secret_lib.find(str(tmp_path), 0, ProcessesConfig()) == (b'a' * 32, 'T5X_CPM_TOKEN')
  assert not any(tmp_path.iterdir())
  monkeypatch.setenv(secret_lib.VARIABLE, 'short')
  with pytest.raises(ProcessError, match='T5X_CPM_TOKEN has 5 characters: expected at least 16'):
    secret_lib.find(str(tmp_path), 0, ProcessesConfig())
