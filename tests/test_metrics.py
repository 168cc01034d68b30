"""What a run reports, and that it is cut back to a restored step."""

import contextlib
import io
import json
import os
import pathlib
import subprocess
import sys
import textwrap
import types

import jax
import numpy as np
import pytest
from etils import epath
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib import font_manager

from t5x_cpm.config import Config, ConfigError, MetricsConfig, ModelConfig
from t5x_cpm.models import encoder_decoder
from t5x_cpm.training import flops, metrics, plots
from t5x_cpm.training.profile import Profile

ROOT = pathlib.Path(__file__).resolve().parent.parent


def config(**fields):
  return Config(metrics=MetricsConfig(**{'every': 2, 'peak_flops': 1e12} | fields))


def values(step):
  return {'loss': 10.0 / step, 'accuracy': 0.25, 'encoder_tokens': 100, 'decoder_tokens': 28}


def run(model_dir, start, stop, total=10, cfg=None, evaluate=()):
  with metrics.Writers(model_dir, cfg or config(), start_step=start, total_steps=total) as writers:
    for step in range(start + 1, stop + 1):
      writers.step(step, values(step))
      if step in evaluate:
        writers.evaluation(step, {'loss': 20.0 / step})


def records(model_dir):
  return [json.loads(line) for line in (model_dir / 'metrics.jsonl').read_text().splitlines()]


def losses(model_dir):
  return [(record['step'], record['split'], record['loss']) for record in records(model_dir)]


def events(model_dir, split):
  """(step, name, value) as TensorBoard reads them; it checks the checksums. Its public loader would import TensorFlow."""
  from tensorboard.compat.proto.event_pb2 import Event
  from tensorboard.compat.tensorflow_stub import errors
  from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import PyRecordReader_New

  found = []
  for path in sorted((model_dir / 'tensorboard' / split).iterdir()):
    reader = PyRecordReader_New(str(path))
    with contextlib.suppress(errors.OutOfRangeError):
      while True:
        reader.GetNext()
        event = Event.FromString(reader.record())
        found += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
  return found


def test_jsonl_holds_every_nth_step_the_first_and_the_last(tmp_path):
  run(tmp_path, 0, 9, total=9, evaluate=(4, 9))
  assert losses(tmp_path) == [
      (1, 'train', 10.0), (2, 'train', 5.0), (4, 'train', 2.5), (4, 'eval', 5.0), (6, 'train', 10 / 6), (8, 'train', 1.25),
      (9, 'train', 10 / 9), (9, 'eval', 20 / 9)]
  first, second = records(tmp_path)[:2]
  assert 'tokens_per_second' not in first  # the time of the first step is that of the compiler
  assert second['tokens_per_second'] == pytest.approx(128 * second['steps_per_second'])
  expected = flops.model_flops(ModelConfig(), 100, 28, 512, 128) * second['steps_per_second']
  assert second['model_flops_per_second'] == pytest.approx(expected)
  assert second['mfu'] == pytest.approx(expected / (1e12 * jax.device_count()))


def test_a_line_is_on_disk_when_step_returns(tmp_path):
  writers = metrics.Writers(tmp_path, config(), start_step=0, total_steps=10)
  writers.step(1, values(1))
  assert losses(tmp_path) == [(1, 'train', 10.0)]
  assert ('loss', 10.0) in [(name, value) for _, name, value in events(tmp_path, 'train')]
  writers.close()


def test_evaluation_time_is_not_training_time(tmp_path, monkeypatch):
  now = [0.0]
  monkeypatch.setattr(metrics.time, 'monotonic', lambda: now[0])
  with metrics.Writers(tmp_path, config(), start_step=0, total_steps=10) as writers:
    for step in range(1, 5):
      now[0] += 0.5
      writers.step(step, values(step))
      if step == 3:
        now[0] += 1000.0
        writers.evaluation(step, {'loss': 1.0})
  assert [record.get('steps_per_second') for record in records(tmp_path)] == [None, 2.0, None, 2.0]


def test_each_step_has_its_own_time_where_it_has_run_before_it_is_read(tmp_path, monkeypatch):
  now = [0.0]
  monkeypatch.setattr(metrics.time, 'monotonic', lambda: now[0])
  step = types.SimpleNamespace(abstract_state={'params': {'w': jax.ShapeDtypeStruct((4,), np.float32)}})
  with metrics.Writers(tmp_path, config(every=1, tensorboard=False), start_step=0, total_steps=6) as writers:
    late = metrics.LateMetrics(step, {}, writers)
    for number in range(1, 7):
      now[0] += 0.5  # the call returns when the step has run
      late.report({})
      late.add(number, {name: jax.device_put(value) for name, value in (values(number) | {'halted': False}).items()}, {})
      if number in (1, 6):
        late.report({})
  assert [record.get('tokens_per_second') for record in records(tmp_path)] == [None, *[256.0] * 5]


def test_resume_gives_the_file_of_a_run_that_never_stopped(tmp_path):
  """Killed at step 7 and restored at step 4, with a broken last line; each way of reporting has each step once."""
  plain, resumed = tmp_path / 'plain', tmp_path / 'resumed'
  plain.mkdir()
  resumed.mkdir()
  run(plain, 0, 10, evaluate=(4, 8))
  run(resumed, 0, 7, evaluate=(4,))
  with (resumed / 'metrics.jsonl').open('a') as file:
    file.write('{"step": 7, "split": "tr')
  [last] = (resumed / 'tensorboard' / 'train').iterdir()
  with last.open('ab') as file:
    file.write(b'\x18\x00\x00')
  run(resumed, 4, 10, evaluate=(8,))
  assert losses(resumed) == losses(plain)
  for split in ('train', 'eval'):
    kept = [event for event in events(resumed, split) if event[1] == 'loss']
    assert kept == [event for event in events(plain, split) if event[1] == 'loss']
  assert len(list((resumed / 'tensorboard' / 'train').iterdir())) == 2


def test_a_run_that_died_before_its_first_checkpoint_starts_over(tmp_path):
  run(tmp_path, 0, 3)
  run(tmp_path, 0, 1)
  assert losses(tmp_path) == [(1, 'train', 10.0)]
  assert [event[0] for event in events(tmp_path, 'train') if event[1] == 'loss'] == [1]


def test_a_value_that_is_not_finite_is_null(tmp_path):
  with metrics.Writers(tmp_path, config(), start_step=0, total_steps=10) as writers:
    writers.step(1, values(1) | {'loss': float('nan'), 'gradient_norm': float('inf')})
  [record] = records(tmp_path)
  assert record['loss'] is None and record['gradient_norm'] is None


def test_other_processes_write_nothing(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(jax, 'process_index', lambda: 1)
  run(tmp_path, 0, 4, evaluate=(4,))
  assert not list(tmp_path.iterdir()) and not capsys.readouterr().out


def test_progress_without_a_terminal_is_a_few_lines(tmp_path, monkeypatch, capsys):
  now = [0.0]
  monkeypatch.setattr(metrics.time, 'monotonic', lambda: now[0])
  with metrics.Writers(tmp_path, config(every=100), start_step=0, total_steps=100) as writers:
    for step in range(1, 101):
      now[0] += 0.25
      writers.step(step, values(step))
  lines = capsys.readouterr().out.splitlines()
  assert [line.split()[1] for line in lines] == ['1/100', '41/100', '81/100', '100/100']
  assert lines[1].endswith('0:00:15 left')
  assert 'loss 0.1000  512 tokens/s' in lines[-1]


def test_progress_on_a_terminal_is_a_bar(tmp_path, monkeypatch):
  terminal = io.StringIO()
  monkeypatch.setattr(terminal, 'isatty', lambda: True)
  monkeypatch.setattr(sys, 'stderr', terminal)
  with metrics.Writers(tmp_path, config(), start_step=4, total_steps=10) as writers:
    writers.step(5, values(5))
    writers.note('a remark')
  assert '5/10' in terminal.getvalue() and '50%' in terminal.getvalue()


def test_wandb(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, 'wandb', None)  # as if it were not installed
  with pytest.raises(ConfigError, match=r"MetricsConfig.wandb_project = 'p' needs the package wandb: run 'pip install wandb'"):
    metrics.Writers(tmp_path, config(wandb_project='p'), start_step=0, total_steps=10)
  log = []
  started = types.SimpleNamespace(log=lambda values, step: log.append((step, values)), finish=lambda: log.append('finished'))
  fake = types.SimpleNamespace(init=lambda **given: log.append(given) or started, Error=ValueError)
  monkeypatch.setitem(sys.modules, 'wandb', fake)
  run(tmp_path, 4, 6, cfg=config(wandb_project='p'), evaluate=(6,))
  assert (log[0]['project'], log[0]['group'], log[0]['name']) == ('p', tmp_path.name, f'{tmp_path.name}-from-4')
  assert log[1][0] == 6 and log[1][1]['train/loss'] == pytest.approx(10 / 6)
  assert log[2:] == [(6, {'eval/loss': 20 / 6}), 'finished']
  fake.init = lambda **given: int('no key')
  with pytest.raises(ConfigError, match="W&B did not start: .*'no key' Run 'wandb login', set WANDB_MODE=offline"):
    metrics.Writers(tmp_path, config(wandb_project='p'), start_step=0, total_steps=10)


def test_profile_window(tmp_path):
  with Profile(tmp_path, MetricsConfig(profile_start=2, profile_steps=2)) as profile:
    for step in range(4):
      with profile.step(step):
        np.asarray(jax.numpy.ones(3) * step)
      assert not (tmp_path / 'profile').exists()
  assert list((tmp_path / 'profile').rglob('*.xplane.pb'))


def test_plot(tmp_path):
  with pytest.raises(ConfigError, match='no metrics yet'):
    plots.plot_loss(tmp_path)
  run(tmp_path, 0, 10, evaluate=(5, 10))
  path = plots.plot_loss(tmp_path)
  assert path == epath.Path(tmp_path) / 'loss.png'
  data = path.read_bytes()
  assert data.startswith(b'\x89PNG') and len(data) > 10_000


@settings(max_examples=20, deadline=None)
@given(name=st.text(min_size=1) | st.sampled_from(['我的模型', 'a$b$c', '$\\frac$', 'é\n\t', '\udce4', '😀' * 50]))
def test_any_name_of_a_folder_has_a_title(name):
  """Without a Chinese font Chinese is escaped, and no title is read as a formula."""
  title, families = plots._title(name, ())
  assert families == ['DejaVu Sans'] and len(title) <= plots.LONGEST_TITLE and title.isprintable()
  covered = font_manager.get_font(font_manager.findfont('DejaVu Sans')).get_charmap()
  assert all(ord(char) in covered for char in title)


def test_a_font_is_used_for_what_it_alone_can_write():
  own, other = (font_manager.get_font(font_manager.findfont(name)).get_charmap() for name in ('DejaVu Sans', 'STIXGeneral'))
  code = next(code for code in other if code not in own and chr(code).isprintable())
  assert plots._title(f'a{chr(code)}', ('No Such Font', 'STIXGeneral')) == (f'a{chr(code)}', ['DejaVu Sans', 'STIXGeneral'])
  assert plots._title('a', ('STIXGeneral',)) == ('a', ['DejaVu Sans'])


@pytest.mark.filterwarnings('error')  # matplotlib warns of a character that it draws as a box
@pytest.mark.parametrize('name', ['我的模型', 'a$b$c_\udce4'])
def test_nothing_covers_a_curve_whatever_the_name(tmp_path, monkeypatch, name):
  saved = []
  monkeypatch.setattr(plots, '_save', lambda figure, path: saved.append(figure))
  (tmp_path / name).mkdir()
  lines = [json.dumps({'split': split, 'step': step, 'loss': 1 / step}) for step in range(1, 9) for split in ('train', 'eval')]
  (tmp_path / name / 'metrics.jsonl').write_text('\n'.join(lines) + '\n')
  plots.plot_loss(tmp_path / name)
  figure, = saved
  figure.canvas.draw()
  legend, axes = figure.legends[0].get_window_extent(), figure.axes[0].get_window_extent()
  assert legend.y1 <= axes.y0 and legend.y0 >= 0 and not figure.axes[0].texts


def test_model_flops_are_those_that_xla_counts():
  """The formula counts matrix products; XLA adds a little for norms, softmax and activations."""
  model_config = ModelConfig(
      vocab_size=512, d_model=256, d_ff=512, num_heads=4, head_dim=64, num_encoder_layers=2, num_decoder_layers=3,
      layer_loop='unroll')
  B, S, T = 2, 64, 32
  model = encoder_decoder.build(model_config)
  batch = {name: jax.ShapeDtypeStruct((B, S), np.int32) for name in ('encoder_input_tokens', 'encoder_segment_ids')}
  batch |= {name: jax.ShapeDtypeStruct((B, T), np.int32) for name in ('decoder_input_tokens', 'decoder_segment_ids')}
  forward = jax.jit(lambda params, batch: model.apply(params, batch)[0])
  counted = forward.lower(model.abstract()[0], batch).cost_analysis()['flops']
  expected = flops.model_flops(model_config, B * S, B * T, S, T) / 3
  assert 1.0 < counted / expected < 1.1


def test_peak_flops():
  kind = lambda name: types.SimpleNamespace(platform='gpu', device_kind=name)  # noqa: E731
  assert flops.peak_flops(kind('NVIDIA A100-SXM4-80GB')) == 312e12
  assert flops.peak_flops(kind('NVIDIA H100 80GB HBM3')) == 989e12
  assert flops.peak_flops(kind('NVIDIA H100 PCIe')) == 756e12
  assert (flops.peak_flops(kind('NVIDIA L4')), flops.peak_flops(kind('NVIDIA L40S'))) == (121e12, 362e12)
  assert flops.peak_flops(kind('TPU v5 lite')) == 197e12
  assert flops.peak_flops(kind('TPU v5p')) == flops.peak_flops(kind('TPU v5')) == 459e12
  assert flops.peak_flops(kind('TPU v6 lite')) == 918e12
  assert flops.peak_flops(kind('Voodoo 2')) is None
  assert flops.peak_flops(kind('Voodoo 2'), 5e9) == 5e9
  measured = flops.peak_flops(jax.devices('cpu')[0])
  assert measured is not None and 1e8 < measured < 1e14


def test_unknown_device_has_no_mfu(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(flops, 'peak_flops', lambda device, configured: None)
  run(tmp_path, 0, 2)
  assert 'mfu' not in records(tmp_path)[1]
  assert 'set MetricsConfig.peak_flops' in capsys.readouterr().out


def test_no_tensorflow(tmp_path):
  code = '''
    import sys
    from t5x_cpm.config import Config
    from t5x_cpm.training import metrics
    with metrics.Writers(sys.argv[1], Config(), start_step=0, total_steps=2) as writers:
      writers.step(1, {'loss': 1.0, 'encoder_tokens': 1, 'decoder_tokens': 1})
    with metrics.Writers(sys.argv[1], Config(), start_step=0, total_steps=2):
      pass
    from t5x_cpm.training import plots
    assert 'tensorboard' in sys.modules
    assert not {'tensorflow', 'matplotlib', 'wandb', 'orbax', 'clu'} & set(sys.modules)
  '''
  result = subprocess.run(
      [sys.executable, '-c', textwrap.dedent(code), str(tmp_path)], cwd=ROOT, text=True, capture_output=True,
      env=os.environ | {'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': str(ROOT)}, timeout=120)
  assert result.returncode == 0, result.stderr
