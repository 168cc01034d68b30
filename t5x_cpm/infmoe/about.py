"""What bundle.json says: of which run a bundle is, how it is stored, and what its files hold. Imports no JAX."""

from typing import Any

from t5x_cpm import stored
from t5x_cpm.checkpoints import run_directory
from t5x_cpm.checkpoints.run_directory import CheckpointError, RunInfo
from t5x_cpm.config import from_dict
from t5x_cpm.config.offload import FORMATS

VERSION = 1
ABOUT = 'bundle.json'
STORED = ('format', 'dense_format', 'group')  # the fields of OffloadConfig that say how matrices are stored
REMEDY = 'Make the bundle again, or put back a copy of the file.'
_FORM = {
    'version': stored.COUNT, 'code_version': str, 'config': dict, 'info': dict, 'step': stored.COUNT, 'started': dict,
    'format': FORMATS, 'dense_format': FORMATS, 'group': stored.COUNT,
    'files': {str: {'bytes': stored.COUNT, 'digests': {str: str}}}}


def is_bundle(path: Any) -> bool:
  """Whether a folder holds a bundle."""
  return (run_directory.resolve(path) / ABOUT).exists()


def read(path: Any) -> dict[str, Any]:
  """What bundle.json says. Raises CheckpointError where it is damaged, or another version wrote it."""
  file = run_directory.resolve(path) / ABOUT
  try:
    about = stored.parse(file, REMEDY, 'version', finite=False)
    if about.get('version') != VERSION:
      raise CheckpointError(f'{file} has version {about.get("version")}, written by t5x_cpm {about.get("code_version")}; this '
                            f'one reads version {VERSION}. Make the bundle again.')
    stored.require(file, about, _FORM, REMEDY)
  except stored.DamagedError as error:
    raise CheckpointError(str(error)) from error
  return about


def read_run(path: Any, step: int | None = None) -> RunInfo:
  """As `run_directory.read_run`, also for the folder of a bundle, which has one step alone."""
  if not is_bundle(path):
    return run_directory.read_run(path, step)
  about = read(path)
  if step not in (None, about['step']):
    raise CheckpointError(f'{path} is a bundle of step {about["step"]}, and has no step {step}.')
  return RunInfo(from_dict(about['config']), about['step'], about['info'], [about['step']], {}, about['started'])


def weights(path: Any) -> str:
  """The fingerprint of the weights that a bundle was made of; '' for what is no bundle."""
  return read(path)['info']['weights'] if is_bundle(path) else ''
