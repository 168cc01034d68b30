"""The files that CPM-2 was published in: what torch saved of model-parallel parts, of the dense models and of CPM-2-MoE.

A dense model lies in ITERATION/mp_rank_<part>_model_states.pt, one file for each of the parts between which its matrices
are split, in 16 bits. CPM-2-MoE lies in mp_rank_<expert>_<part>_model_states.pt: each expert has parts of its own, in which the
rest of the model is repeated; in the checkpoint that its training began with, all experts are one. The number of parts is free.

Their matrices are [out, in] and one per layer, ours [in, out] and stacked. Queries, keys and values of a part lie in one
matrix, one below the other. Sources: github.com/TsinghuaAI/CPM-2-Pretrain, src/mpu/transformer_enc_dec.py, and in its branch
moe init_ckpt.py and src/utils.py.
"""

import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

from t5x_cpm import trees, user_files
from t5x_cpm.checkpoints.readers import Index, Kind, TensorReader, TorchReader, check_finite, check_fits, equal, misfits
from t5x_cpm.config import ConfigError, ModelConfig, MoEConfig
from t5x_cpm.models import encoder_decoder
from t5x_cpm.models.leaf import Leaf
from t5x_cpm.progress import Progress

LATEST = 'latest_checkpointed_iteration.txt'
UNDER = 'module', 'model'  # where the tensors lie in what a file holds: of dense models, and of CPM-2-MoE
# Names of the one embedding table: published files have all three.
TABLES = 'word_embeds.weight', 'encoder.word_embeds.weight', 'decoder.word_embeds.weight'
_FILE = re.compile(r'mp_rank_(\d+)(?:_(\d+))?_model_states\.pt')

Place = tuple[int, int]  # expert (0 in dense models) and part


class Tensor(NamedTuple):
  """Where a parameter is found in the parts.

  Attributes:
    name: theirs; {0} is the number of the layer.
    axis: of their matrix, along which parts are split; None: each part has the whole.
    fused: how many parameters lie one below the other in it, and which of them this is.
    transposed: whether theirs is [out, in] and ours [in, out].
  """

  name: str
  axis: int | None
  fused: tuple[int, int] = (1, 0)
  transposed: bool = True


def tensors(config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
  """Every parameter of a model by its name here, and where it is found."""
  yield 'token_embedder/embedding', Tensor(TABLES[0], 0, transposed=False)
  yield 'lm_head', Tensor('lm_head.weight', 0)
  for stack in ('encoder', 'decoder'):
    block = f'{stack}.blocks.{{0}}'
    attention = f'{block}.self_attn.self_attn'
    for number, kernel in enumerate(('query', 'key', 'value')):
      yield f'{stack}/layers/attention/{kernel}', Tensor(f'{attention}.project.weight', 0, (3, number))
    yield f'{stack}/layers/attention/output', Tensor(f'{attention}.dense.weight', 1)
    yield f'{stack}/layers/attention_norm/scale', Tensor(f'{block}.self_attn.layer_norm.weight', None, transposed=False)
    if stack == 'decoder':
      cross = f'{block}.cross_attn.cross_attn'
      yield f'{stack}/layers/cross_attention/query', Tensor(f'{cross}.project_q.weight', 0)
      for number, kernel in enumerate(('key', 'value')):
        yield f'{stack}/layers/cross_attention/{kernel}', Tensor(f'{cross}.project_kv.weight', 0, (2, number))
      yield f'{stack}/layers/cross_attention/output', Tensor(f'{cross}.dense.weight', 1)
      norm = f'{block}.cross_attn.layer_norm.weight'
      yield f'{stack}/layers/cross_attention_norm/scale', Tensor(norm, None, transposed=False)
    network = f'{block}.ff.expert_network' if config.moe.num_experts else f'{block}.ff'
    yield f'{stack}/layers/mlp_norm/scale', Tensor(f'{network}.layer_norm.weight', None, transposed=False)
    for kernel, axis in (('wi_0', 0), ('wi_1', 0), ('wo', 1)):
      yield f'experts/{stack}/{kernel}', Tensor(f'{network}.dense_relu_dense.{kernel}.weight', axis)
    if config.moe.num_experts:
      yield f'{stack}/routers/centroids', Tensor(f'{block}.ff.expert_centroids', None)
    bias = f'{stack}.blocks.0.self_attn.self_attn.relative_attention_bias.weight'
    yield f'{stack}/relative_bias/table', Tensor(bias, 1, transposed=False)
    yield f'{stack}/final_norm/scale', Tensor(f'{stack}.final_layernorm.weight', None, transposed=False)


# ---- Files ----


def is_folder(folder: pathlib.Path) -> bool:
  """Whether a folder holds such files, or the folder of an iteration that does."""
  return folder.is_dir() and ((folder / LATEST).exists() or any(_FILE.fullmatch(path.name) for path in folder.iterdir()))


def _iteration(folder: pathlib.Path) -> pathlib.Path:
  """The folder with the files: the given one, the one that LATEST names, or the only one with a number for a name."""
  if not folder.is_dir():
    raise ConfigError(f'{folder} is not a folder: expected that of the files of CPM-2.')
  if any(_FILE.fullmatch(path.name) for path in folder.iterdir()):
    return folder
  if (folder / LATEST).exists():
    user_files.check(folder / LATEST, str(folder / LATEST))
    named = (folder / LATEST).read_bytes()[:100].decode(errors='replace').strip()
    if not named.isdecimal() or not (folder / named).is_dir():
      raise ConfigError(f'{folder / LATEST} says {named!r}: expected the number of an iteration, whose folder lies beside it.')
    return folder / named
  numbered = sorted(path.name for path in folder.iterdir() if path.name.isdecimal() and path.is_dir())
  if len(numbered) != 1:
    found = f'the iterations {", ".join(numbered)}, of which {LATEST} would name one' if numbered else 'neither'
    raise ConfigError(f'{folder}: expected files mp_rank_00_model_states.pt ..., or one folder of an iteration; there is '
                      f'{found}.')
  return folder / numbered[0]


def find(folder: pathlib.Path) -> dict[Place, pathlib.Path]:
  """The files of all parts. Raises ConfigError, which names the first file that is missing."""
  where = _iteration(folder)
  named = {match: path for path in sorted(where.iterdir()) if (match := _FILE.fullmatch(path.name))}
  kinds = {bool(match[2]) for match in named}
  if not kinds:
    raise ConfigError(f'{where} has no file mp_rank_00_model_states.pt.')
  if len(kinds) > 1:
    raise ConfigError(f'{where} has files of a dense model (mp_rank_00_...) and of experts (mp_rank_00_00_...): keep one kind.')
  files = {((int(match[1]), int(match[2])) if match[2] else (0, int(match[1]))): path for match, path in named.items()}
  experts, parts = (max(place[axis] for place in files) + 1 for axis in (0, 1))
  for place in np.ndindex(experts, parts):
    if place not in files:
      name = f'mp_rank_{place[0]:02}_{place[1]:02}' if kinds == {True} else f'mp_rank_{place[1]:02}'
      raise ConfigError(f'{where} has {len(files)} files of the kind of {next(iter(files.values())).name}, but no '
                        f'{name}_model_states.pt.')
  return files


def read_parts(folder: pathlib.Path) -> dict[Place, TorchReader]:
  """The readers of all parts. Raises ConfigError where one is missing or damaged, or they are not of one checkpoint."""
  files, result = find(folder), {}
  progress = Progress('check', 'file', len(files))
  for place, path in files.items():
    result[place] = TorchReader([path], UNDER)
    if len(files) > 8:
      progress.show(len(result))
  progress.close()
  degree = max(place[1] for place in files) + 1
  first = result[0, 0]
  for place, reader in result.items():
    said = reader.about.get('mp_world_size', degree)
    if said != degree:
      raise ConfigError(f'{files[place]} was saved as one of {said} model-parallel parts, but there are files of {degree}.')
    if reader.about.get('iteration') != first.about.get('iteration'):
      raise ConfigError(f'{files[place]} is of iteration {reader.about.get("iteration")}, and {files[0, 0]} of '
                        f'{first.about.get("iteration")}: they are not of one checkpoint.')
    if prompts := [name for name in reader.kinds if 'prompt_embeds' in name]:
      raise ConfigError(f'{files[place]} has {prompts[0]}: it is a model with tuned prompts. Here prompts are a delta, apart '
                        'from their base: give the files of the model that they were tuned on.')
    check_fits(f'{files[place]} does not fit {files[0, 0]}',
               misfits(reader.kinds, {name: kind.shape for name, kind in first.kinds.items()}))
  return result


# ---- Parameters ----


def configuration(where: str, kinds: Mapping[str, Kind], degree: int) -> ModelConfig:
  """The model, by the shapes in one of `degree` parts. Raises ConfigError where what says a size is missing."""
  routed = any('.ff.expert_network.' in name for name in kinds)
  network = 'ff.expert_network' if routed else 'ff'
  sizes = {'table': next((name for name in TABLES if name in kinds), TABLES[0])}
  sizes |= {'bias': 'encoder.blocks.0.self_attn.self_attn.relative_attention_bias.weight',
            'query': 'encoder.blocks.0.self_attn.self_attn.project.weight',
            'wi': f'encoder.blocks.0.{network}.dense_relu_dense.wi_0.weight'}
  sizes |= {'centroids': 'encoder.blocks.0.ff.expert_centroids'} if routed else {}
  for name in sizes.values():
    if name not in kinds or len(kinds[name].shape) != 2:
      raise ConfigError(f'{where}: {name} is {"no matrix" if name in kinds else "missing"}: it is not the file of a CPM-2.')
  shapes = {key: kinds[name].shape for key, name in sizes.items()}
  heads = degree * shapes['bias'][1]
  layers = {stack: len({match[1] for name in kinds if (match := re.match(rf'{stack}\.blocks\.(\d+)\.', name))})
            for stack in ('encoder', 'decoder')}
  if not heads or shapes['query'][0] % (3 * shapes['bias'][1]):
    raise ConfigError(f'{where}: {sizes["query"]} has {shapes["query"][0]} rows, which are not queries, keys and values of '
                      f'{shapes["bias"][1]} heads ({sizes["bias"]}).')
  moe = MoEConfig(num_experts=shapes['centroids'][0], router='random_projection') if routed else MoEConfig()
  config = ModelConfig(
      vocab_size=degree * shapes['table'][0], d_model=shapes['table'][1], d_ff=degree * shapes['wi'][0], num_heads=heads,
      head_dim=degree * shapes['query'][0] // (3 * heads), num_encoder_layers=layers['encoder'],
      num_decoder_layers=layers['decoder'], num_buckets=shapes['bias'][0], moe=moe)
  config.validate()
  return config


class Source:
  """The parameters of a model in such files, slice by slice.

  Attributes:
    config: of the model, by the shapes of its tensors.
    leaves: its parameters by name.
    degree: between how many parts its matrices are split.
    files: the file of each part.
  """

  def __init__(self, folder: pathlib.Path):
    """Raises ConfigError where the files are not those of a CPM-2, or are damaged, incomplete or of several checkpoints."""
    self._parts = read_parts(folder)
    self.files = find(folder)
    self.degree = max(part for _, part in self._parts) + 1
    first, where = self._parts[0, 0], str(self.files[0, 0])
    self.config = configuration(where, first.kinds, self.degree)
    self.leaves = trees.named(encoder_decoder.build(self.config).leaves())
    self._tensors = dict(tensors(self.config))
    self._table = next(name for name in TABLES if name in first.kinds)
    wanted = dict(self._wanted())
    spare = {name: first.kinds[name].shape for name in TABLES if name in first.kinds}
    check_fits(f'{where} is not the file of a CPM-2 of its sizes', misfits(first.kinds, spare | wanted))
    experts, files = self.config.moe.num_experts, len(self._parts) // self.degree
    if files not in (1, experts):
      raise ConfigError(f'{self.files[0, 0].parent} has the files of {files} experts, but the centroids of {experts}'
                        f'{f": there is no mp_rank_{files:02}_00_model_states.pt" if files < experts else ""}.')
    self._check_copies(wanted)

  def _wanted(self) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Their names, with the shape of one part."""
    for path, tensor in self._tensors.items():
      leaf = self.leaves[path]
      shape = list(leaf.shape[len(leaf.stacked):])
      shape = shape[::-1] if tensor.transposed else shape
      if tensor.axis is not None:
        shape[tensor.axis] = shape[tensor.axis] * tensor.fused[0] // self.degree
      for layer in range(leaf.shape[0] if leaf.stacked else 1):
        yield self._name(tensor, (layer,)), tuple(shape)

  def _name(self, tensor: Tensor, index: Index) -> str:
    return self._table if tensor.name == TABLES[0] else tensor.name.format(*index[:1])

  def _check_copies(self, wanted: Mapping[str, tuple[int, ...]]) -> None:
    """Raises ConfigError where what is one tensor differs between the parts, or under another of its names."""
    whole = {self._name(tensor, (layer,)) for path, tensor in self._tensors.items() if tensor.axis is None
             for layer in range(self.leaves[path].shape[0] if self.leaves[path].stacked else 1)}
    first = self._parts[0, 0]
    for place, reader in self._parts.items():
      for name in sorted(whole & wanted.keys()):
        if not np.array_equal(reader.read(name), first.read(name)):
          raise ConfigError(f'{self.files[place]} and {self.files[0, 0]} disagree: {name}, which all parts share, differs. '
                            'They are not of one checkpoint.')
      for name in TABLES:
        if name in reader.kinds and not equal(reader, self._table, name):
          raise ConfigError(f'{self.files[place]}: {self._table} and {name} differ: here encoder and decoder share one '
                            'embedding table.')

  def read(self, leaf: Leaf, index: Index) -> np.ndarray:
    """A slice of a parameter, in its type. Raises ConfigError where it is not finite."""
    tensor = self._tensors[leaf.name]
    name = self._name(tensor, index)
    expert = index[1] if len(index) > 1 and (1, 0) in self._parts else 0
    value = np.empty(leaf.shape[len(index):], np.dtype(leaf.dtype))
    theirs = value.T if tensor.transposed else value
    for part in range(self.degree if tensor.axis is not None else 1):
      reader: TensorReader = self._parts[expert, part]
      piece = reader.read(name)
      count, number = tensor.fused
      rows = len(piece) // count
      piece = check_finite(reader, name, piece[number * rows:(number + 1) * rows])
      if tensor.axis is None:
        theirs[...] = piece
      else:
        size = piece.shape[tensor.axis]
        theirs[(slice(None),) * tensor.axis + (slice(part * size, (part + 1) * size),)] = piece
    return value
