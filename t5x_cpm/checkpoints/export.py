"""Models of this project in the files of transformers, with its tokenizer and a model card."""

import json
import pathlib
import shutil
from typing import Any

import numpy as np

import t5x_cpm
from t5x_cpm import stored, vocabularies
from t5x_cpm.checkpoints import huggingface, run_directory, safetensors_files
from t5x_cpm.checkpoints.run_directory import CheckpointError, RunInfo
from t5x_cpm.checkpoints.tensors import PARTIAL, CheckpointReader, check_room
from t5x_cpm.config import to_dict

BEGUN = 'made_from.json'  # in DIR.partial, what its files are made of

CARD = """\
---
library_name: transformers
pipeline_tag: text2text-generation
---
# {name}

An encoder-decoder language model of {parameters:,} parameters, written by t5x_cpm {version} from step {step:,} of its run.

| | |
|---|---|
{rows}

With transformers:

```python
import transformers
model = transformers.{cls}.from_pretrained({name!r})
{tokenizer}
```

With t5x_cpm, which trains it on, tunes, evaluates and serves it:

```bash
python -m t5x_cpm convert hf {name} runs/{name}
python -m t5x_cpm infer --model_dir=runs/{name}
```
"""


def _card(name: str, run: RunInfo, words: vocabularies.Vocabulary, described: dict[str, Any], parameters: int) -> str:
  """README.md: what the model is, and how both systems load it."""
  model = run.config.model
  rows = {
      'layers': f'{model.num_encoder_layers} + {model.num_decoder_layers}', 'd_model': model.d_model, 'd_ff': model.d_ff,
      'heads': f'{model.num_heads} x {model.head_dim}', 'activation': model.mlp_activation,
      'head': 'the embedding table' if model.tie_embeddings else 'a table of its own',
      'experts': f'{model.moe.num_experts}, router {model.moe.router!r}' if model.moe.num_experts else 'none',
      'vocabulary': f'{words.kind}, {words.size:,} tokens', 'steps': f'{run.step:,}',
      'task': run.config.task.name, 'objective': run.config.task.objective, 'parameters are': model.param_dtype}
  rows |= {f'`{key}`': f'{value:.6g}' for key, value in sorted(run.metrics.items()) if np.isfinite(value)}
  if words.kind == 'sentencepiece':
    tokenizer = f'tokenizer = transformers.AutoTokenizer.from_pretrained({name!r})'
  else:
    tokenizer = (f'import t5x_cpm.vocabularies  # transformers has no tokenizer of this kind: encode() and decode() of\n'
                 f"words = t5x_cpm.vocabularies.load_saved('{name}/vocabulary')")
  return CARD.format(name=name, parameters=parameters, version=t5x_cpm.__version__, step=run.step,
                     rows='\n'.join(f'| {key} | {value} |' for key, value in rows.items()),
                     cls=described['architectures'][0], tokenizer=tokenizer)


def _write_tokenizer(folder: pathlib.Path, words: vocabularies.Vocabulary) -> None:
  """spiece.model and tokenizer_config.json, by which AutoTokenizer cuts a text as the vocabulary does."""
  import sentencepiece

  file = folder / 'vocabulary' / pathlib.Path(words.files[0]).name
  shutil.copyfile(file, folder / 'spiece.model')
  pieces = {name: words.piece(token) for name, token in (('eos_token', words.eos_id), ('unk_token', words.unk_id),
                                                         ('pad_token', words.pad_id))}
  own = sentencepiece.SentencePieceProcessor(model_file=str(file)).get_piece_size()
  described = {'tokenizer_class': 'T5Tokenizer', 'extra_ids': words.size - own, **pieces}
  (folder / 'tokenizer_config.json').write_text(json.dumps(described, indent=2, ensure_ascii=False) + '\n', encoding='utf-8')


def _begin(partial: pathlib.Path, made_from: str) -> None:
  """Makes DIR.partial, or goes on with what a killed command has left of the same model in it."""
  begun = partial / BEGUN
  if partial.exists() and not (begun.exists() and begun.read_text() == made_from):
    if any(partial.iterdir()) and not begun.exists():
      raise CheckpointError(f'{partial} is in the way: move it away, or give another folder.')
    shutil.rmtree(partial)
  partial.mkdir(parents=True, exist_ok=True)
  begun.write_text(made_from)


def to_huggingface(model_dir: str, output: str, *, step: int | None = None, limit: int = safetensors_files.SHARD_BYTES) -> None:
  """Writes what `from_pretrained` of transformers reads, the vocabulary beside it, and a model card.

  Parameters pass through memory slice by slice. Everything lies in OUTPUT.partial until it is complete.

  Args:
    model_dir: the run's directory.
    output: a new local folder.
    step: the step of the checkpoint; by default the last.
    limit: bytes of a file of weights.

  Raises:
    ConfigError: there is no such checkpoint, transformers has no such model, or the folder is not empty.
  """
  run = run_directory.read_run(model_dir, step)
  run_directory.check_is_model(model_dir, run.config)
  saved = pathlib.Path(model_dir) / 'vocabulary'
  words = vocabularies.load_saved(saved)
  run_directory.check_vocabulary(model_dir, run.info, words.fingerprint)
  described = huggingface.write_config(run.config.model) | {
      'pad_token_id': words.pad_id, 'eos_token_id': words.eos_id, 'decoder_start_token_id': words.bos_id}
  theirs = huggingface.Exported(run.config.model, CheckpointReader(model_dir, run.step))
  leaves = {part.leaf.name: part.leaf for part in theirs.parts.values()}

  with run_directory.writing(output):
    target = run_directory.new(output, 'DIR')
    if '://' in str(target):
      raise CheckpointError(f'DIR={output}: expected a local folder.')
    check_room(target, sum(kind.nbytes for kind in theirs.kinds.values()), 'the model')
    folder = pathlib.Path(target)
    partial = folder.with_name(f'{folder.name}{PARTIAL}')
    meta = run_directory.read_meta(run_directory.resolve(model_dir), run.step)
    _begin(partial, stored.digest([to_dict(run.config), run.step, meta.get('arrays', {}), limit]))
    safetensors_files.write(partial, theirs.kinds, theirs.read, 'convert', limit)
    (partial / 'config.json').write_text(json.dumps(described, indent=2) + '\n')
    shutil.copytree(saved, partial / 'vocabulary', dirs_exist_ok=True)
    if words.kind == 'sentencepiece':
      _write_tokenizer(partial, words)
    number = sum(leaf.size for leaf in leaves.values())
    (partial / 'README.md').write_text(_card(folder.name, run, words, described, number), encoding='utf-8')
    if folder.exists():
      folder.rmdir()
    partial.rename(folder)
    (folder / BEGUN).unlink()  # after the rename, so that a kill between the two loses nothing
  print(f'{output}: {number:,} parameters of step {run.step}, in {", ".join(sorted(file.name for file in folder.iterdir()))}',
        flush=True)
