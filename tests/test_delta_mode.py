"""The mode `delta`: what is shown, a merged model, the average of several, and what is refused."""

import dataclasses
import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_step
import test_tuning

from t5x_cpm import inference, trees, tuning
from t5x_cpm.__main__ import main
from t5x_cpm.checkpoints import arrays, run_directory
from t5x_cpm.config import Config, DeltaConfig
from t5x_cpm.models import encoder_decoder
from t5x_cpm.training import train as training
from t5x_cpm.tuning import methods

base_dir, whole = test_tuning.base_dir, test_tuning.whole
BOTH = DeltaConfig(method='lora+ia3', rank=3, alpha=6.0, sites=('query', 'value', 'mlp'))
LORA = dataclasses.replace(BOTH, method='lora')


def shapes(config, model):
  """The shape of every tensor of a delta on a model, as its files hold it."""
  return {name: tuple(size for size, axis in zip(leaf.shape, leaf.axes) if axis != 'slot')
          for name, leaf in trees.named(methods.leaves(model, config)).items()}


def write(folder, base_dir, config, seed=0, **changes) -> str:
  """A delta of random numbers on the base, but for some tensors."""
  base, rng = tuning.find(base_dir), np.random.default_rng(seed)
  run = run_directory.read_run(base.model_dir, base.step)
  tensors = {name: rng.normal(0, 0.3, shape).astype(np.float32)
             for name, shape in shapes(config, run.config.model).items()} | changes
  tuning.write(folder, tensors, Config(delta=config), base, step=seed + 4, vocabulary=run.info['vocabulary'],
               metrics={'eval/loss': 2.5})
  return str(folder)


def logits(base_dir, path=None, model_dir=None):
  """Those of a base with a delta, or of a model_dir without one."""
  run = run_directory.read_run(model_dir or base_dir)
  params = arrays.load_params(model_dir or base_dir)
  config = dataclasses.replace(test_step.CONFIG, model=run.config.model)
  if path is None:
    assert not run.config.delta.method
    return np.asarray(jax.jit(encoder_decoder.build(run.config.model).apply)(params, test_step.random_batch(config, 0))[0])
  saved = tuning.read(path)
  model = tuning.build_model(dataclasses.replace(config, delta=saved.config))
  delta = trees.nested({name: jnp.asarray(value)[:, None] for name, value in saved.tensors.items()})
  return np.asarray(jax.jit(model.apply)(params | {'delta': delta}, test_step.random_batch(config, 0))[0])


def call(capsys, *words) -> tuple[int, str, str]:
  code = main(['delta', *map(str, words)])
  out, error = capsys.readouterr()
  return code, out, error


def refused(capsys, message, *words):
  capsys.readouterr()
  code, out, error = call(capsys, *words)
  assert code == 2 and message in error and error.count('\n') == 1 and not out, (out, error)


def test_it_shows_what_a_delta_is(base_dir, tmp_path, capsys):
  path = write(tmp_path / 'delta', base_dir, BOTH)
  code, out, _ = call(capsys, 'show', f'--delta={path}')
  saved = tuning.read(path)
  count = sum(value.size for value in saved.tensors.values())
  facts = dict(re.findall(r'^(\w+) +(.+)$', out.split('\n\n')[0], re.MULTILINE))
  assert code == 0 and facts['method'] == 'lora+ia3' and facts['step'] == '4' and facts['metrics'] == 'eval/loss = 2.5'
  assert facts['fingerprint'] == saved.about['base']['fingerprint'] and facts['vocabulary'] == saved.about['vocabulary']
  assert facts['base'] == f'{base_dir} at step 5'
  assert facts['parameters'] == f'{count:,}' and facts['bytes'] == f'{4 * count:,}'
  assert 'rank = 3' in facts['hyperparameters'] and 'bottleneck' not in facts['hyperparameters']
  rows = {row.split()[0]: row for row in out.split('\n\n')[1].splitlines()[1:]}
  assert rows.keys() == saved.tensors.keys()
  for name, value in saved.tensors.items():
    assert str(list(value.shape)) in rows[name]
    assert float(rows[name].split()[-1]) == pytest.approx(np.linalg.norm(value), rel=1e-3)


def test_a_merged_model_has_the_logits_of_the_delta(base_dir, tmp_path, capsys):
  path, merged = write(tmp_path / 'delta', base_dir, BOTH), tmp_path / 'merged'
  code, out, error = call(capsys, 'merge', f'--delta={path}', f'--output={merged}')
  assert (code, error) == (0, '') and 'merged into' in out
  run = run_directory.read_run(merged)
  assert run.config.model == run_directory.read_run(base_dir).config.model and run.config.task.objective == 'pairs'
  before, after = (trees.named(arrays.load_params(folder)) for folder in (base_dir, merged))
  changed = {name for name in before if not np.array_equal(before[name], after[name])}
  assert before.keys() == after.keys() and 'encoder/layers/attention/query' in changed
  assert all(name.rpartition('/')[2] in ('query', 'key', 'value', 'wi_0', 'wi_1', 'wo') for name in changed)
  expected = logits(base_dir, path)
  np.testing.assert_allclose(logits(base_dir, model_dir=merged), expected, atol=1e-5 * np.abs(expected).max())

  refused(capsys, 'exists already', 'merge', f'--delta={path}', f'--output={merged}')
  tuning.find(merged)  # it can be a base itself


@pytest.mark.slow
def test_a_merged_run_is_read_like_any_other(base_dir, whole, tmp_path):
  merged, texts = tmp_path / 'merged', ['一', '二三']
  assert main(['delta', 'merge', f'--delta={whole[0]}', f'--output={merged}']) == 0
  engine = inference.load(merged)
  assert engine.config.task.name == 'local'  # as in the run of the delta
  np.testing.assert_allclose(engine.score(texts, texts), inference.load(whole[0]).score(texts, texts), rtol=1e-5)
  config = dataclasses.replace(test_tuning.tuned(base_dir, steps=2), delta=DeltaConfig())
  config = dataclasses.replace(config, train=dataclasses.replace(config.train, init_from=str(merged)))
  training.run(config, str(tmp_path / 'tuned'))
  assert main(['eval', f'--model_dir={merged}', '--tasks=local', '--gin.EvalConfig.max_examples=4']) == 0


@pytest.mark.parametrize('weights', ['', pytest.param('0.75,0.25', marks=pytest.mark.slow)])
def test_the_average_of_loras_is_that_of_their_products(base_dir, tmp_path, capsys, weights):
  other = dataclasses.replace(BOTH, rank=2, alpha=3.0, rank_stabilised=True)
  paths = [write(tmp_path / f'delta{seed}', base_dir, config, seed) for seed, config in enumerate((BOTH, other))]
  code, out, _ = call(capsys, 'average', *(f'--delta={path}' for path in paths), f'--output={tmp_path / "both"}',
                      *([f'--weights={weights}'] if weights else []))
  assert code == 0 and 'of rank 5' in out
  shares = [float(share) for share in (weights or '0.5,0.5').split(',')]
  saved = [tuning.read(path) for path in (*paths, tmp_path / 'both')]
  assert saved[2].about['step'] == 5 and saved[2].about['base'] == saved[0].about['base']
  for name in saved[0].tensors:
    if name.endswith('/a'):
      products = [one.tensors[name] @ one.tensors[f'{name[:-1]}b'] * tuning.lora.scale_of(one.config) for one in saved]
    elif name.endswith('/b'):
      continue
    else:
      products = [one.tensors[name] for one in saved]
    np.testing.assert_allclose(products[2], shares[0] * products[0] + shares[1] * products[1], atol=1e-6)


def test_what_does_not_go_together_is_refused(base_dir, tmp_path, capsys):
  output, lora = f'--output={tmp_path / "out"}', write(tmp_path / 'lora', base_dir, LORA)
  others = {name: write(tmp_path / name, base_dir, config) for name, config in {
      'bitfit': DeltaConfig(method='bitfit'), 'adapter': DeltaConfig(method='lora+adapter', bottleneck=2),
      'prompt': DeltaConfig(method='prompt', prompt_length=3), 'longer': DeltaConfig(method='prompt', prompt_length=4),
      'fewer': dataclasses.replace(LORA, sites=('query',)), 'full': dataclasses.replace(LORA, rank=14)}.items()}
  for name, message in (('bitfit', 'these models have no bias vectors'), ('adapter', "'adapter' cannot be merged"),
                        ('prompt', "'prompt' cannot be merged")):
    refused(capsys, message, 'merge', f'--delta={others[name]}', output)
  for name, message in (('bitfit', "DeltaConfig.method: 'lora' and 'bitfit'"), ('fewer', 'different sites'),
                        ('full', 'the average has the ranks of all together: DeltaConfig.rank = 17')):
    refused(capsys, message, 'average', f'--delta={lora}', f'--delta={others[name]}', output)
  refused(capsys, 'DeltaConfig.prompt_length: 3 and 4', 'average', f'--delta={others["prompt"]}', f'--delta={others["longer"]}',
          output)
  for weights in ('0.5', '0.5,0.6', 'a,b', 'nan,1', '1,0,0'):
    refused(capsys, 'whose sum is 1', 'average', f'--delta={lora}', f'--delta={lora}', f'--weights={weights}', output)
  refused(capsys, "expected 'lora' or 'prompt', alone", 'to_peft', f'--delta={others["adapter"]}', output)

  name = 'encoder/layers/self.query/lora/a'
  value = tuning.read(lora).tensors[name]
  broken = write(tmp_path / 'broken', base_dir, LORA, **{name: value * np.where(value == value.max(), np.inf, 1)})
  for action in ('merge', 'to_peft'):
    refused(capsys, f'{name} is not finite', action, f'--delta={broken}', output)
  refused(capsys, 'not finite', 'average', f'--delta={lora}', f'--delta={broken}', output)
  huge = {name: value * 1e38, f'{name[:-1]}b': np.full((1, 3, 16), 3e38, np.float32)}
  large = write(tmp_path / 'large', base_dir, LORA, **huge)
  refused(capsys, 'attention/query[0] would have', 'merge', f'--delta={large}', output)
  refused(capsys, f'{name} is [1, 15, 3], expected [1, 16, 3]', 'merge', output,
          f'--delta={write(tmp_path / "narrow", base_dir, LORA, **{name: value[:, 1:]})}')
  refused(capsys, 'x/y/lora/a is left over', 'merge', output,
          f'--delta={write(tmp_path / "more", base_dir, LORA, **{"x/y/lora/a": value})}')
  assert not (tmp_path / 'out').exists()


def test_the_base_is_the_one_that_it_was_trained_on(base_dir, tmp_path, capsys):
  moved, output = tmp_path / 'moved', f'--output={tmp_path / "out"}'
  path = write(tmp_path / 'delta', base_dir, LORA)
  shutil.copytree(base_dir, moved)
  other = write(tmp_path / 'other', moved, LORA)
  refused(capsys, 'holds no delta', 'show', f'--delta={base_dir}')
  shutil.rmtree(moved / 'checkpoints' / '5')
  elsewhere = write(tmp_path / 'elsewhere', moved, LORA)
  for action in ('merge', 'to_peft'):
    refused(capsys, 'was trained on a base with the fingerprint', action, f'--delta={path}', f'--base={moved}', output)
  refused(capsys, 'have different bases', 'average', f'--delta={path}', f'--delta={elsewhere}', output)
  shutil.rmtree(moved)
  refused(capsys, 'give --base=DIR, where it is now', 'to_peft', f'--delta={other}', output)
  assert call(capsys, 'to_peft', f'--delta={other}', f'--base={base_dir}', output)[0] == 0
  assert json.loads((tmp_path / 'out' / 'adapter_config.json').read_text())['peft_type'] == 'LORA'


@pytest.mark.parametrize('words, message', [
    (['shew', '--delta=d'], 'Did you mean show?'), ([], 'delta needs show|merge|average|to_peft|from_peft after its name'),
    (['show'], 'delta show needs --delta=DIR'),
    (['show', '--delta=d', '--output=o'], '--output is not a flag of delta show'),
    (['merge', '--delta=d'], 'delta merge needs --output=DIR'), (['merge', '--delta=d', '--delta=e', '--output=o'], 'got 2'),
    (['average', '--delta=d', '--output=o'], 'two times or more'),
    (['from_peft', '--peft=p', '--output=o'], 'needs --base=DIR'),
    (['merge', '--delta=d', '--output=o', '--weights=1'], '--weights is not a flag of delta merge')])
def test_flags_that_are_missing_or_of_another_action(capsys, words, message):
  refused(capsys, message, *words)
