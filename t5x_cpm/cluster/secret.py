"""The secret that only the processes of a run know, and how one of them shows another that it does.

It comes from the environment of the launcher, or from a file that process 0 makes in the shared model_dir and that nobody else
may read. It never travels: who listens sends a random challenge, who comes answers with a challenge of its own and the keyed
hash of both, and the listener answers that with another hash of both. So each knows whom it talks to before it says more.
"""

import contextlib
import hmac
import os
import re
import secrets
import time
from typing import Any, NamedTuple

from etils import epath

from t5x_cpm import files
from t5x_cpm.cluster.group import ProcessError
from t5x_cpm.config import ProcessesConfig

VARIABLE = 'T5X_CPM_TOKEN'
FILE = '.processes_secret'
SHORTEST = 16  # characters: fewer could be guessed from the hash of a challenge
LISTENER, COMER = 'process 0', 'a process that comes'  # so that an answer cannot be sent back as one's own


class Secret(NamedTuple):
  """A secret, and where it is from, as an error names it."""

  value: bytes
  origin: str

  def answer(self, who: str, challenge: str, counter: str) -> str:
    """What `who` sends to show that it knows the secret.

    Args:
      who: LISTENER or COMER.
      challenge: of the process that listens.
      counter: the challenge of the process that comes.
    """
    return hmac.new(self.value, f'{who} {challenge} {counter}'.encode(errors='surrogatepass'), 'sha256').hexdigest()

  def is_answer(self, given: Any, who: str, challenge: str, counter: Any) -> bool:
    """Whether `who` knows the secret. What was received may be of any type."""
    if not isinstance(given, str) or not isinstance(counter, str):
      return False
    return hmac.compare_digest(given.encode(errors='replace'), self.answer(who, challenge, counter).encode())


def challenge() -> str:
  """A random challenge, never the same twice."""
  return secrets.token_hex(32)


def _make(path: Any) -> None:
  """Writes the file with a new secret, complete or not at all."""
  path.parent.mkdir(parents=True, exist_ok=True)
  text = secrets.token_hex(32).encode()
  if '://' in str(path):  # a bucket, which says itself who may read it
    path.write_bytes(text)
    return
  temporary = path.with_name(f'{FILE}.tmp{os.getpid()}')
  with contextlib.suppress(FileNotFoundError):
    os.unlink(temporary)  # of a process that was killed and had this number
  with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), 'wb') as file:
    file.write(text)
  files.move(temporary, path)


def _read(path: Any) -> bytes:
  """The content of the file; b'' if there is none, or it is not what `_make` writes: process 0 makes it again."""
  try:
    text = files.read_bytes(path).strip()
  except FileNotFoundError:
    return b''
  return text if re.fullmatch(rb'[0-9a-f]{64}', text) else b''


def find(model_dir: str, index: int, config: ProcessesConfig) -> Secret:
  """The secret of a run.

  Args:
    model_dir: the folder that all processes share. Process 0 makes the file there if there is none; the others wait for it.
    index: which process this is.
    config: how long to wait.

  Raises:
    ProcessError: the variable holds too little, the file cannot be made or read, or does not appear.
  """
  given = os.environ.get(VARIABLE, '')
  if given:
    if len(given) < SHORTEST:
      raise ProcessError(f'{VARIABLE} has {len(given)} characters: expected at least {SHORTEST}, as from openssl rand -hex 32.')
    return Secret(given.encode(errors='surrogateescape'), VARIABLE)
  path = epath.Path(model_dir).expanduser() / FILE
  deadline = time.monotonic() + config.start_seconds
  try:
    if index == 0 and not _read(path):
      _make(path)
    while not (value := _read(path)):
      if time.monotonic() > deadline:
        raise ProcessError(
            f'{path}, which process 0 makes, did not appear within {config.start_seconds:g} s '
            '(ProcessesConfig.start_seconds): --model_dir must be a folder that all processes share, and '
            f'{VARIABLE} set for all of them or for none.')
      time.sleep(0.2)
    if index == 0 and '://' not in str(path) and os.stat(path).st_mode & 0o077:
      print(f'{path}, the secret of the processes, can be read by others: chmod 600 it, or set {VARIABLE}.', flush=True)
  except OSError as error:
    raise ProcessError(f'{path}, the secret of the processes, cannot be used: {error.strerror or error}. Make it readable and '
                       f'writable for yourself, or set {VARIABLE} for all processes.') from error
  return Secret(value, str(path))
