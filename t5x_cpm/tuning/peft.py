"""LoRA and prompts in the files of the library `peft`: adapter_config.json and adapter_model.safetensors, for its T5 models.

Their matrices are [out, in] and one per layer, ours [in, out] and stacked. A feature of theirs that has no counterpart here is
refused by its name.
"""

import dataclasses
import itertools
import json
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from t5x_cpm import files as file_lib
from t5x_cpm import user_files
from t5x_cpm.checkpoints import huggingface, run_directory
from t5x_cpm.config import Config, ConfigError, DeltaConfig, ModelConfig
from t5x_cpm.config.fields import shown
from t5x_cpm.models.hooks import PRODUCTS
from t5x_cpm.tuning import base as bases
from t5x_cpm.tuning import files, opened

CONFIG, WEIGHTS = 'adapter_config.json', 'adapter_model.safetensors'
PREFIX = 'base_model.model.'  # of the names of modules
PROMPT = 'prompt_embeddings'
# What these say is read, or changes nothing of what a trained adapter computes: where it is from, how it began.
READ = {'peft_type', 'task_type', 'r', 'lora_alpha', 'use_rslora', 'init_lora_weights', 'num_virtual_tokens', 'token_dim',
        'num_transformer_submodules', 'target_modules', 'lora_dropout'}
IDLE = {'auto_mapping', 'base_model_name_or_path', 'revision', 'peft_version', 'inference_mode',
        'megatron_core', 'qalora_group_size', 'num_attention_heads', 'num_layers', 'prompt_tuning_init',
        'prompt_tuning_init_text', 'tokenizer_name_or_path', 'tokenizer_kwargs', 'exclude_modules', 'layers_to_transform',
        'layers_pattern', 'runtime_config', 'ensure_weight_tying'}
PLAIN_STARTS = (True, False, None, 'gaussian', 'orthogonal')  # of init_lora_weights; others change the base as well


def _modules(model: ModelConfig) -> Iterator[tuple[str, str, list[str]]]:
  """Where a LoRA may act: our site, with its stack, and the path of its component; their module of each layer."""
  paths = {kernel: site for sites in PRODUCTS.values() for site, kernel in sites.items() if not site.startswith('shared')}
  for tensor in huggingface.tensors(model):
    path, kernel = tensor.path, ''
    while '/' in path and kernel not in paths:
      path, _, last = path.rpartition('/')
      kernel = f'{last}/{kernel}' if kernel else last
    if kernel in paths and len(tensor.stack) == 1:
      yield path, paths[kernel], [tensor.name.removesuffix('.weight').format(layer) for layer in tensor.stack[0]]


def _targets(chosen: list[str], every: list[str]) -> list[str]:
  """The shortest `target_modules`: the last names of modules, such as q, where all modules of these names are chosen."""
  last = sorted({name.rpartition('.')[2] for name in chosen})
  return last if {name for name in every if name.rpartition('.')[2] in last} == set(chosen) else sorted(chosen)


def _lora_to_peft(tensors: Mapping[str, np.ndarray], config: DeltaConfig, model: ModelConfig) -> tuple[dict[str, Any], dict]:
  result, chosen = {}, []
  for path, site, modules in _modules(model):
    if f'{path}/{site}/lora/a' not in tensors:
      continue
    chosen += modules
    for ours, theirs in (('a', 'lora_A'), ('b', 'lora_B')):
      for layer, module in enumerate(modules):
        result[f'{PREFIX}{module}.{theirs}.weight'] = np.ascontiguousarray(tensors[f'{path}/{site}/lora/{ours}'][layer].T)
  every = [tensor.name.removesuffix('.weight').format(*numbers) for tensor in huggingface.tensors(model)
           for numbers in itertools.product(*tensor.stack)]  # 'wi' alone would mean the experts too
  alpha = int(config.alpha) if config.alpha == int(config.alpha) else config.alpha
  return {'peft_type': 'LORA', 'r': config.rank, 'lora_alpha': alpha, 'use_rslora': config.rank_stabilised,
          'target_modules': _targets(chosen, every), 'lora_dropout': config.lora_dropout, 'bias': 'none',
          'fan_in_fan_out': False, 'init_lora_weights': True, 'modules_to_save': None}, result


def to_peft(path: str, output: str, base_dir: str = '') -> None:
  """Writes a folder that peft's `PeftModel.from_pretrained` reads, onto what `convert to_hf` makes of the base.

  Args:
    path: the delta's folder, or the model_dir of its run.
    output: a new folder.
    base_dir: where the base has moved.

  Raises:
    ConfigError: the delta is of another method than 'lora' or 'prompt', or transformers has no such model.
  """
  folder = run_directory.new(output, '--output')
  delta = opened.open_delta(path, base_dir)
  config, model = delta.saved.config, delta.run.config.model
  described: dict[str, Any]
  if config.methods not in (('lora',), ('prompt',)):
    raise ConfigError(f"--delta={path}: {config.method!r} has no form in peft's files: expected 'lora' or 'prompt', alone.")
  for field, value in (('token_ids', config.token_ids), ('modules_to_save', config.modules_to_save),
                       ('decoder_prompt_length', config.decoder_prompt_length)):
    if value:
      raise ConfigError(f"--delta={path}: DeltaConfig.{field} = {shown(value)} is not written to peft's files.")
  huggingface.write_config(model)  # raises where transformers has no such model
  if config.method == 'lora':
    described, tensors = _lora_to_peft(delta.saved.tensors, config, model)
  else:
    table = delta.saved.tensors['prompt/table']
    tensors = {PROMPT: table}
    described = {'peft_type': 'PROMPT_TUNING', 'num_virtual_tokens': table.shape[0], 'token_dim': table.shape[1],
                 'num_transformer_submodules': 1, 'num_attention_heads': model.num_heads,
                 'num_layers': model.num_encoder_layers, 'prompt_tuning_init': 'RANDOM', 'prompt_tuning_init_text': None}
  described |= {'task_type': 'SEQ_2_SEQ_LM', 'base_model_name_or_path': None, 'revision': None, 'inference_mode': True}
  with run_directory.writing(folder):
    folder.mkdir(parents=True, exist_ok=True)
    file_lib.write_atomically(folder / WEIGHTS, safetensors.numpy.save(tensors, {'format': 'pt'}))
    file_lib.write_atomically(folder / CONFIG, (json.dumps(described, indent=2, sort_keys=True) + '\n').encode())
  print(f'{output}: {config.method} as {described["peft_type"]} of peft, {len(tensors)} tensors; its base is what '
        f'`convert to_hf {delta.base.model_dir} DIR` writes', flush=True)


def _read_weights(folder: pathlib.Path) -> dict[str, np.ndarray]:
  path = folder / WEIGHTS
  if not path.exists() and (folder / 'adapter_model.bin').exists():
    raise ConfigError(f'{folder / "adapter_model.bin"} is a pickle, and is not opened: unpickling a file may run any program. '
                      'Save the adapter as .safetensors.')
  user_files.check(path, str(path))
  try:
    found = safetensors.numpy.load_file(path)  # unlike `load` it takes bfloat16
  except safetensors.SafetensorError as error:
    raise ConfigError(f'{path} is damaged: {error}.') from None
  except OSError as error:
    raise ConfigError(f'{path} cannot be read: {error.strerror or error}.') from None
  except (AttributeError, KeyError, TypeError) as error:
    raise ConfigError(f'{path} has tensors of a type that NumPy lacks ({error}): save it in float32 or bfloat16.') from None
  return {name: np.asarray(value, np.float32) for name, value in found.items()}


def _check_features(described: Mapping[str, Any], name: str) -> None:
  """Raises ConfigError for what a config asks for that is not here. What is off is null, false, 0, empty or 'none'."""
  if described.get('task_type') not in (None, 'SEQ_2_SEQ_LM'):
    raise ConfigError(f"{name}: task_type = {shown(described['task_type'])}: expected 'SEQ_2_SEQ_LM'.")
  for key, value in described.items():
    if key not in READ and key not in IDLE and value and value != 'none':
      raise ConfigError(f'{name}: {key} = {shown(value)}: a delta here has nothing of this kind.')
  start = described.get('init_lora_weights')
  if not any(start is plain or start == plain for plain in PLAIN_STARTS):
    raise ConfigError(f'{name}: init_lora_weights = {shown(start)} changes the base as well as the adapter: save it as a plain '
                      'LoRA with peft (path_initial_model_for_weight_conversion).')


def _number(described: Mapping[str, Any], key: str, name: str, kind: Any = int) -> Any:
  value = described.get(key)
  if not isinstance(value, kind) or isinstance(value, bool) or not 0 < value < 1e9:
    raise ConfigError(f'{name}: {key} = {shown(value)}: expected a number above 0.')
  return value


def _dropout(described: Mapping[str, Any], name: str) -> float:
  value = described.get('lora_dropout') or 0.0
  if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < 1:
    raise ConfigError(f'{name}: lora_dropout = {shown(value)}: expected a number from 0 to below 1.')
  return float(value)


def _lora_from_peft(described: Mapping[str, Any], given: dict[str, np.ndarray], model: ModelConfig, name: str) -> tuple[
    DeltaConfig, dict[str, np.ndarray]]:
  rank, alpha = _number(described, 'r', name), _number(described, 'lora_alpha', name, int | float)
  tensors, sites = {}, []
  left = set(given)
  for path, site, modules in _modules(model):
    names = [f'{PREFIX}{module}.lora_A.weight' for module in modules]
    if not left & set(names):
      continue
    stack = 'encoder' if path.removeprefix('experts/').startswith('encoder') else 'decoder'
    sites.append(f'{stack}.{site}')
    for ours, theirs in (('a', 'lora_A'), ('b', 'lora_B')):
      own = [other.replace('.lora_A.', f'.{theirs}.') for other in names]
      if missing := [other for other in own if other not in given]:
        raise ConfigError(f'{name}: it adapts some layers and not others, or is cut short: there is no {missing[0]}. Here a '
                          'delta acts in every layer of a stack.')
      if len({given[other].shape for other in own}) > 1 or given[own[0]].ndim != 2:
        raise ConfigError(f'{name}: {own[0]} and the same matrix of other layers have different shapes, or are no matrices.')
      tensors[f'{path}/{site}/lora/{ours}'] = np.ascontiguousarray(np.stack([given[other].T for other in own]))
      left -= set(own)
  if left:
    raise ConfigError(f'{name}: {min(left)} is not a matrix of a LoRA on this base.')
  if not sites:
    raise ConfigError(f'{name}: it holds no tensor.')
  return DeltaConfig(method='lora', rank=rank, alpha=float(alpha), rank_stabilised=bool(described.get('use_rslora')),
                     lora_dropout=_dropout(described, name), sites=tuple(sites)), tensors


def _prompt_from_peft(described: Mapping[str, Any], given: dict[str, np.ndarray], name: str) -> tuple[
    DeltaConfig, dict[str, np.ndarray]]:
  length = _number(described, 'num_virtual_tokens', name)
  table = given.get(PROMPT)
  parts = described.get('num_transformer_submodules') or 2
  if set(given) != {PROMPT} or table is None or table.ndim != 2 or len(table) != length * parts:
    raise ConfigError(f'{name}: expected one tensor, {PROMPT}, of {length} x {parts} rows (num_virtual_tokens x '
                      'num_transformer_submodules).')
  if parts > 1:
    print(f'{name}: the last {length * (parts - 1)} of {len(table)} vectors are left out: peft makes them for the decoder, and '
          'never reads them.', flush=True)
  return DeltaConfig(method='prompt', prompt_length=length, prompt_init='random'), {'prompt/table': table[:length].copy()}


def from_peft(path: str, base_dir: str, output: str) -> None:
  """Writes a delta from a folder that peft's `save_pretrained` wrote.

  Args:
    path: folder with adapter_config.json and adapter_model.safetensors.
    base_dir: the model_dir of its base, as from `convert hf`.
    output: a new folder.

  Raises:
    ConfigError: it is another kind of adapter, uses what a delta here does not have, or does not fit the base.
  """
  folder, target = pathlib.Path(path), run_directory.new(output, '--output')
  base = bases.find(base_dir)
  run = run_directory.read_run(base.model_dir, base.step)
  huggingface.check_layers(run.config.model)
  name = f'--peft={path}'
  if not (folder / CONFIG).exists():
    raise ConfigError(f'{name}: there is no {CONFIG} in it.')
  described = user_files.json_file(folder / CONFIG, str(folder / CONFIG))
  kind = described.get('peft_type')
  if kind not in ('LORA', 'PROMPT_TUNING'):
    raise ConfigError(f"{folder / CONFIG}: peft_type = {shown(kind)}: expected 'LORA' or 'PROMPT_TUNING'.")
  _check_features(described, str(folder / CONFIG))
  given = _read_weights(folder)
  for key in given:
    if re.search(r'lora_magnitude_vector|lora_embedding|\.bias$|modules_to_save', key):
      raise ConfigError(f'{name}: {key}: a delta here has nothing of this kind.')
  if kind == 'LORA':
    config, tensors = _lora_from_peft(described, given, run.config.model, name)
  else:
    config, tensors = _prompt_from_peft(described, given, name)
  config.validate()
  opened.check_fits(name, tensors, config, run.config.model)
  pairs = dataclasses.replace(run.config.task, objective='pairs')
  files.write(target, tensors, Config(delta=config, task=pairs), base, step=0, vocabulary=str(run.info.get('vocabulary', '')),
              metrics={})
  count = sum(value.size for value in tensors.values())
  print(f'{output}: {config.method} of {count:,} parameters on {base.model_dir} at step {base.step}', flush=True)
