"""What a stranger may send to an open port."""

import contextlib
import json
import socket

from t5x_cpm.cluster import secret as secret_lib
from t5x_cpm.cluster.secret import Secret

SECRET = Secret(b'what all processes know', 'this test')
OTHER = Secret(b'what a stranger guesses', 'a stranger')
HELLO = {'hello': 1, 'count': 2, 'host': 'there', 'settings': ['same', 'a']}
STATUS = {'progress': 1 << 40, 'doing': 'nothing', 'done': True}


def as_line(value) -> bytes:
  return json.dumps(value).encode() + b'\n'


# What somebody may send to an open port before he has read anything.
HOSTILE = [
    b'5\n', b'\n', b'null\n', b'true\n', b'"hello"\n', b'[]\n', b'[[1, 2]]\n', b'{}\n', b'{', b'\x00' * 64, b'\xff\xfe\n',
    b'1e999\n', b'NaN\n', b'9' * 4000 + b'\n', b'[' * 4000 + b'\n', b'{"a":' * 800 + b'\n', b'a' * 100_000,
    b'a' * 2_000_000 + b'\n',
    b'GET / HTTP/1.1\r\nHost: there\r\n\r\n', b'SSH-2.0-OpenSSH_9.6\r\n', b'\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03',
    b'PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n', as_line(HELLO), as_line(HELLO) * 50, as_line(HELLO | {'settings': ['a' * 2_000_000]}),
    as_line({'go': True}), as_line({'stop': 'because'}), as_line({'error': 'because'}), as_line(STATUS),
    as_line({'failed': 'because'} | STATUS), as_line({'beat': True}), as_line({'challenge': 'a', 'answer': 'b'}),
    as_line({'challenge': 'a', 'answer': OTHER.answer(secret_lib.COMER, 'a', 'a')}), as_line({'challenge': 1, 'answer': 2}),
    as_line({'challenge': '\ud800', 'answer': '\ud800'}), as_line({'challenge': None, 'answer': None}),
    as_line({'challenge': 'a', 'answer': 'é'}), as_line({'denied': True}), b'\r\n' * 1000,
]


def insult(port: int) -> bytes:
  """Sends everything hostile, each over a connection of its own, some slowly, and returns all that came back."""
  heard, idle = b'', []
  for number, greeting in enumerate(HOSTILE):
    with contextlib.suppress(OSError):  # nobody listens, or the other end has had enough
      idle.append(socket.create_connection(('127.0.0.1', port)))
      with socket.create_connection(('127.0.0.1', port), timeout=5) as connection:
        if number % 7:
          connection.sendall(greeting)
        else:
          for byte in greeting[:20]:  # whose end never comes
            connection.sendall(bytes([byte]))
        if number % 3:  # the others are gone at once
          connection.shutdown(socket.SHUT_WR)
          while data := connection.recv(1 << 16):
            heard += data
  for connection in idle:
    connection.close()
  return heard
