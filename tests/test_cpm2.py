"""`convert cpm2`: the files that CPM-2 was published in give the logits that transformers computes of the merged weights."""

import pathlib
import re
from typing import Any

import numpy as np
import pytest
import small_cpm2
import test_parity

from t5x_cpm.__main__ import main
from t5x_cpm.checkpoints import arrays, cpm2, run_directory
from t5x_cpm.config import ConfigError
from t5x_cpm.models import encoder_decoder

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group('torch')]


@pytest.fixture(scope='module')
def model():
  """A T5 with weights of 16 bits."""
  torch, transformers = pytest.importorskip('torch'), pytest.importorskip('transformers')
  model = transformers.T5ForConditionalGeneration(transformers.T5Config(**small_cpm2.CONFIG)).eval()
  model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
  test_parity.golden_t5.draw(model, np.random.default_rng(7))
  return model.half().float()


@pytest.fixture(scope='module')
def batch():
  rng = np.random.default_rng(8)
  return rng.integers(11, 64, (3, 40)), rng.integers(11, 64, (3, 20))


def logits_of(model: Any, batch: Any) -> np.ndarray:
  import torch
  with torch.no_grad():
    return model(input_ids=torch.from_numpy(batch[0]), decoder_input_ids=torch.from_numpy(batch[1])).logits.numpy()


def converted(source: pathlib.Path, words: str, output: pathlib.Path) -> Any:
  """Our logits as a function of a batch, from a run directory that the command made."""
  assert main(['convert', 'cpm2', str(source), str(output), f'--vocabulary={words}']) == 0
  config = run_directory.read_run(output).config
  ours, params = encoder_decoder.build(config.model), arrays.load_params(output)
  return config, lambda batch: ours.apply(params, {
      'encoder_input_tokens': batch[0], 'encoder_segment_ids': np.ones_like(batch[0]), 'decoder_input_tokens': batch[1],
      'decoder_segment_ids': np.ones_like(batch[1])})[0]


@pytest.mark.parametrize('degree', [1, 2, 4])
def test_a_dense_model_of_any_degree(model, batch, tmp_path, degree):
  small_cpm2.write_dense(tmp_path / 'cpm2', small_cpm2.merged(model), degree)
  words = small_cpm2.vocabulary(tmp_path)
  config, logits = converted(tmp_path / 'cpm2', words, tmp_path / 'run')
  assert (config.model.num_heads, config.model.head_dim, config.model.d_ff, config.model.tie_embeddings) == (4, 12, 48, False)
  test_parity.assert_equal('logits', logits(batch), logits_of(model, batch))


def experts_of(model: Any, count: int) -> tuple[list[dict[str, Any]], dict[str, Any], list[dict[str, Any]]]:
  """Files of experts; the centroids of all layers; the dense state dicts that the experts come from."""
  import torch

  generator = torch.Generator().manual_seed(3)
  dense = [small_cpm2.merged(model)]
  for _ in range(count - 1):
    dense.append({name: (value.float() + 0.1 * torch.randn(value.shape, generator=generator)).half()
                  if 'dense_relu_dense' in name else value for name, value in dense[0].items()})
  centroids = {f'{stack}.blocks.{n}.ff.expert_centroids': torch.randn(count, 32, generator=generator).half()
               for stack in ('encoder', 'decoder') for n in range(2)}
  return [small_cpm2.as_experts(state, centroids) for state in dense], centroids, dense


def with_experts(model: Any, centroids: dict[str, Any], dense: list[dict[str, Any]]) -> Any:
  """The T5 whose feed-forward networks are experts, each token going to the one whose centroid it is most like."""
  import copy

  import torch

  class Experts(torch.nn.Module):
    def __init__(self, prefix: str, act: Any):
      super().__init__()
      self.centroids, self.act = centroids[f'{prefix}.expert_centroids'].float(), act
      self.networks = [{name: state[f'{prefix}.dense_relu_dense.{name}.weight'].float() for name in ('wi_0', 'wi_1', 'wo')}
                       for state in dense]

    def forward(self, u: Any) -> Any:
      chosen = (u @ self.centroids.T).argmax(dim=-1)
      outputs = torch.stack([(self.act(u @ w['wi_0'].T) * (u @ w['wi_1'].T)) @ w['wo'].T for w in self.networks], dim=-1)
      return outputs.gather(-1, chosen[..., None, None].expand(*u.shape, 1))[..., 0]

  result = copy.deepcopy(model)
  for stack in ('encoder', 'decoder'):
    for n, block in enumerate(getattr(result, stack).block):
      block.layer[-1].DenseReluDense = Experts(f'{stack}.blocks.{n}.ff', block.layer[-1].DenseReluDense.act)
  return result


def test_experts_and_the_checkpoint_that_they_began_with(model, batch, tmp_path, degree=2):
  files, centroids, dense = experts_of(model, 4)
  small_cpm2.write_experts(tmp_path / 'cpm2', files, degree)
  words = small_cpm2.vocabulary(tmp_path)
  config, logits = converted(tmp_path / 'cpm2', words, tmp_path / 'run')
  assert (config.model.moe.num_experts, config.model.moe.router) == (4, 'random_projection')
  want = logits_of(with_experts(model, centroids, dense), batch)
  assert np.abs(want - logits_of(model, batch)).max() > 1
  test_parity.assert_equal('logits', logits(batch), want)

  small_cpm2.write_experts(tmp_path / 'start', files[:1], degree, start=True)
  config, logits = converted(tmp_path / 'start', words, tmp_path / 'start_run')
  assert config.model.moe.num_experts == 4
  test_parity.assert_equal('logits', logits(batch), logits_of(model, batch))  # equal experts: the dense model


def changed(where: pathlib.Path, file: str, change: Any, under: str = 'module') -> None:
  """Changes the state dict of one file."""
  import torch
  saved = torch.load(where / file, weights_only=False)
  change(saved, saved[under])
  torch.save(saved, where / file)


class Program:
  """What a pickle may hold instead of tensors."""

  def __reduce__(self):
    return print, ('this program ran',)


FIRST, SECOND = 'mp_rank_00_model_states.pt', 'mp_rank_01_model_states.pt'
NORM = 'decoder.blocks.1.ff.layer_norm.weight'


@pytest.mark.parametrize('file, change, message', [
    (FIRST, None, 'no mp_rank_00_model_states.pt'),
    (SECOND, lambda saved, state: state[NORM].mul_(2), f'01_.*disagree: {NORM}'),
    (SECOND, lambda saved, state: state.update({NORM: state[NORM][:-1]}), rf'{NORM}: \[31\], expected \[32\]'),
    (SECOND, lambda saved, state: state.pop(NORM), f'01_.*does not fit.*{NORM}: missing'),
    (SECOND, lambda saved, state: state['lm_head.weight'].fill_(np.nan), '01_.*lm_head.weight has numbers'),
    (SECOND, lambda saved, state: state[cpm2.TABLES[1]].mul_(2), f'{cpm2.TABLES[1]} differ'),
    (SECOND, lambda saved, state: saved.update(iteration=5), '01_.*iteration 5, and'),
    (SECOND, lambda saved, state: saved.update(mp_world_size=4), 'one of 4 .* parts, but there are files of 2'),
    (FIRST, lambda saved, state: state.update({'encoder.prompt_embeds.weight': state[NORM][None]}), 'prompt_embeds.*a delta'),
    (FIRST, lambda saved, state: saved.update(args=Program()), 'not opened: unpickling'),
])
def test_files_that_do_not_fit_are_told(model, tmp_path, capsys, file, change, message):
  where = small_cpm2.write_dense(tmp_path / 'cpm2', small_cpm2.merged(model), 2)
  if change is None:
    (where / file).unlink()
  else:
    changed(where, file, change)
  words = small_cpm2.vocabulary(tmp_path)
  assert main(['convert', 'cpm2', str(tmp_path / 'cpm2'), str(tmp_path / 'run'), f'--vocabulary={words}']) == 2
  out, error = capsys.readouterr()
  assert re.search(message, error.replace('\n', ' ')) and 'this program ran' not in out, error
  assert not (tmp_path / 'run').exists()


def test_damaged_files_and_folders(model, tmp_path, capsys):
  state, words = small_cpm2.merged(model), small_cpm2.vocabulary(tmp_path)
  where = small_cpm2.write_dense(tmp_path / 'cpm2', state, 2)

  def told(message: str, *flags: str) -> None:
    command = ['convert', 'cpm2', str(tmp_path / 'cpm2'), str(tmp_path / 'run')]
    assert main([*command, *(flags or [f'--vocabulary={words}'])]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count('\n') == 1, error

  told('have 64 rows, but the vocabulary', f'--vocabulary={small_cpm2.vocabulary(tmp_path, 70)}')
  small_cpm2.vocabulary(tmp_path)
  assert main(['convert', 'cpm2', str(tmp_path / 'cpm2'), str(tmp_path / 'run')]) == 2
  assert 'needs --vocabulary=cpm2:FILE' in capsys.readouterr().err
  path = where / 'mp_rank_01_model_states.pt'
  good = path.read_bytes()
  weights = state['lm_head.weight'].chunk(2)[1].numpy().tobytes()
  at = good.index(weights) + 7
  path.write_bytes(good[:at] + bytes([good[at] ^ 4]) + good[at + 1:])
  told(f'{path} is damaged: the record')
  path.write_bytes(good[:len(good) // 2])
  told(f'{path} is damaged')
  path.write_bytes(good)
  (where.parent / cpm2.LATEST).write_text('5')
  told("says '5'")
  (where.parent / cpm2.LATEST).unlink()
  assert cpm2.find(where.parent) == cpm2.find(where)
  (where.parent / '7').mkdir()
  told('the iterations 36000, 7, of which')


def test_parts_of_experts_that_are_missing(model, tmp_path):
  files, _, _ = experts_of(model, 3)
  where = small_cpm2.write_experts(tmp_path / 'cpm2', files[:2], 2)
  with pytest.raises(ConfigError, match='files of 2 experts, but the centroids of 3: there is no mp_rank_02_00_model'):
    cpm2.Source(where)
  (where / 'mp_rank_00_01_model_states.pt').unlink()
  with pytest.raises(ConfigError, match='but no mp_rank_00_01_model_states.pt'):
    cpm2.Source(where)
  small_cpm2.write_dense(tmp_path / 'dense', small_cpm2.merged(model), 1)
  (where / FIRST).write_bytes((tmp_path / 'dense' / '36000' / FIRST).read_bytes())
  with pytest.raises(ConfigError, match='files of a dense model .* and of experts'):
    cpm2.Source(where)
