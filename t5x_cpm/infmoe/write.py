"""Makes a bundle of a checkpoint, tensor by tensor."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

import t5x_cpm
from t5x_cpm import files, stored, tuning, vocabularies
from t5x_cpm.checkpoints import digests, run_directory
from t5x_cpm.checkpoints.run_directory import CheckpointError
from t5x_cpm.checkpoints.tensors import CheckpointReader, check_room
from t5x_cpm.chips import GiB
from t5x_cpm.config import Config, ConfigError, from_dict, to_dict
from t5x_cpm.infmoe import about as about_lib
from t5x_cpm.infmoe import bundle
from t5x_cpm.infmoe.bundle import Bundle, Entry
from t5x_cpm.infmoe.formats import FORMATS, bits_per_weight
from t5x_cpm.models import encoder_decoder
from t5x_cpm.progress import Progress

JOURNAL = 'journal.jsonl'
PARTIAL = '.partial'


def _write_file(path: pathlib.Path, header: bytes, entries: Mapping[str, Entry], reader: CheckpointReader, config: Config,
                progress: Progress, done: int) -> tuple[dict[str, str], int]:
  """Writes a file; returns the digests of its tensors, and the bytes that were written in all."""
  given = config.offload
  told: dict[str, str] = {}
  parts: Mapping[str, np.ndarray] = {}
  matrix = None
  with run_directory.writing(path), files.replacing(path) as out:
    out.write(header)
    for name, entry in entries.items():
      if not entry.leaf:
        value = np.zeros(entry.kind.shape, entry.kind.dtype)
      elif entry.part:
        if matrix != (entry.leaf, entry.at):
          matrix = entry.leaf, entry.at
          form = FORMATS[given.format if entry.expert else given.dense_format]
          parts = form.encode(reader.read(entry.leaf, entry.at), given.group)
        value = parts[entry.part]
      else:
        value = reader.read(entry.leaf, entry.at)
      value = np.ascontiguousarray(value, entry.kind.dtype)
      assert value.shape == entry.kind.shape, name
      if entry.leaf:
        told[name] = digests.of_host(value)
      out.write(value.reshape(-1).view(np.uint8).data)
      before, done = done, done + value.nbytes
      if done >> 20 > before >> 20:
        progress.show(done >> 20)
  return told, done


def _finished(journal: pathlib.Path, identity: str) -> dict[str, Any]:
  """What an earlier call has written, by file. Raises CheckpointError where it wrote another bundle."""
  if not journal.exists():
    return {}
  lines = journal.read_text().splitlines(keepends=True)
  if not lines or json.loads(lines[0]) != identity:
    raise CheckpointError(f'{journal.parent} was begun by another command: delete it, or give another --output.')
  if not lines[-1].endswith('\n'):  # cut short by a kill: what comes next must not be added to it
    files.write_atomically(journal, ''.join(lines := lines[:-1]).encode())
  return dict(json.loads(line) for line in lines[1:])


def _check(model_dir: Any, config: Config) -> None:
  run_directory.check_is_model(model_dir, config)
  moe = config.model.moe
  if not moe.num_experts:
    raise ConfigError(f'{model_dir} has no experts, which a bundle is for: `infer` runs a dense model as it is, '
                      'and `inherit` with gin/runs/inherit_experts.gin makes experts of it.')


def _told(config: Config, output: Any, sizes: Mapping[str, int]) -> str:
  model, given = config.model, config.offload
  bits = bits_per_weight(given.format, model.d_model, model.d_ff, given.group)
  return (f'{output}: {sum(sizes.values()) / GiB:.3g} GiB in {len(sizes)} files, experts as {given.format} ({bits:.3g} bits a '
          'number)')


def write(config: Config, model_dir: Any, output: Any, step: int | None = None, *, dry_run: bool = False) -> None:
  """Writes a bundle of a checkpoint. The same call goes on where it was stopped.

  Args:
    config: of the run, with the OffloadConfig that is wanted.
    model_dir: of the run.
    output: a new local folder.
    step: of the checkpoint; None is the last.
    dry_run: say what would be written, and stop.

  Raises:
    ConfigError: the model has no experts, is a delta, or cannot be stored so; `output` exists, or its disk is too small.
  """
  run = run_directory.read_run(model_dir, step)
  _check(model_dir, run.config)
  folder = pathlib.Path(run_directory.new(output or 'BUNDLE', '--output'))
  model = encoder_decoder.build(config.model)
  laid_out = bundle.layout(model, config.offload)
  sizes = {file: len(header) + sum(entry.kind.nbytes for entry in entries.values())
           for file, (header, entries) in laid_out.items()}
  if dry_run:
    print(_told(config, output or 'BUNDLE', sizes))
    return
  reader = CheckpointReader(model_dir, run.step)
  vocabulary = vocabularies.load_saved(run_directory.resolve(model_dir) / 'vocabulary')
  run_directory.check_vocabulary(model_dir, run.info, vocabulary.fingerprint)
  about = {'version': about_lib.VERSION, 'code_version': t5x_cpm.__version__, 'config': to_dict(config),
           'info': run.info | {'weights': tuning.fingerprint(run_directory.resolve(model_dir), run.step)}, 'step': run.step,
           'started': run.started} | {name: getattr(config.offload, name) for name in about_lib.STORED}
  partial = folder.parent / f'{folder.name}{PARTIAL}'
  with run_directory.writing(partial):
    partial.mkdir(parents=True, exist_ok=True)
    try:
      with files.lock(partial / '.lock', wait=False):
        identity = stored.digest(json.loads(json.dumps(about)))
        finished = _finished(partial / JOURNAL, identity)
        check_room(partial, sum(size for file, size in sizes.items() if file not in finished), 'the bundle')
        if not finished:
          files.write_atomically(partial / JOURNAL, f'{json.dumps(identity)}\n'.encode())
        vocabulary.save(partial / 'vocabulary')
        done = sum(sizes[file] for file in finished)
        progress = Progress('bundle', 'MiB', sum(sizes.values()) >> 20, done >> 20)
        for file, (header, entries) in laid_out.items():
          if file in finished:
            continue
          told, done = _write_file(partial / file, header, entries, reader, config, progress, done)
          finished[file] = {'bytes': sizes[file], 'digests': told}
          with open(partial / JOURNAL, 'a', encoding='utf-8') as journal:
            journal.write(json.dumps([file, finished[file]]) + '\n')
        progress.close()
        stored.write(partial / about_lib.ABOUT, about | {'files': finished})
        if folder.exists():
          folder.rmdir()
        partial.rename(folder)
        (folder / JOURNAL).unlink()
        (folder / '.lock').unlink()
    except files.LockedError as error:
      raise CheckpointError(f'--output={output} is in use: {error} makes it.') from None
  Bundle(folder, model)  # which checks what is cheap to check
  print(f'{_told(config, output, sizes)}\n  python -m t5x_cpm infer --model_dir={output} --input=FILE')


def verify(path: Any) -> None:
  """Reads all of a bundle, and says that it is intact. Raises CheckpointError for the first tensor that is not."""
  config = from_dict(about_lib.read(path)['config'])
  made = Bundle(path, encoder_decoder.build(config.model))
  progress = Progress('verify', 'MiB', made.size >> 20)
  done = 0
  for count in made.verify():
    before, done = done, done + count
    if done >> 20 > before >> 20:
      progress.show(done >> 20)
  progress.close()
  print(f'{path} is intact: {len(made.entries)} files, {done / GiB:.3g} GiB')
