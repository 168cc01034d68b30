"""Plots of a run, from its metrics.jsonl: the loss, and what its routers do."""

import io
from collections.abc import Sequence
from typing import Any

from etils import epath

from t5x_cpm import files
from t5x_cpm.checkpoints.run_directory import resolve
from t5x_cpm.config import ConfigError
from t5x_cpm.training.records import JOINT, read_jsonl

# Families of fonts with Chinese, in the order of preference; there may be none.
FONTS = ('Noto Sans CJK SC', 'Source Han Sans SC', 'Source Han Sans CN', 'Noto Sans SC', 'WenQuanYi Zen Hei',
         'WenQuanYi Micro Hei', 'PingFang SC', 'Hiragino Sans GB', 'Heiti SC', 'Microsoft YaHei', 'SimHei', 'Noto Sans CJK JP',
         'Noto Sans CJK TC', 'Droid Sans Fallback', 'Arial Unicode MS', 'Noto Serif CJK SC', 'SimSun', 'AR PL UMing CN',
         'AR PL UKai CN', 'Unifont')
LONGEST_TITLE = 60  # characters that fit above a plot


def _title(name: str, families: Sequence[str] = FONTS) -> tuple[str, list[str]]:
  """A name as the fonts of this machine can write it, and their families. What none can write is an escape such as \\u4e2d."""
  from matplotlib import font_manager

  installed = set(font_manager.get_font_names())
  default = font_manager.fontManager.defaultFamily['ttf']
  used, shown = [default], set[int]()
  for family in (default, *(family for family in families if family in installed)):
    covered = set(font_manager.get_font(font_manager.findfont(family)).get_charmap())
    if missing := {ord(char) for char in name} - shown:
      if missing & covered and family != default:
        used.append(family)
      shown |= covered
  can_write = lambda char: ord(char) in shown and char.isprintable()  # noqa: E731
  title = ''.join(char if can_write(char) else char.encode('unicode_escape').decode() for char in name)
  return (title if len(title) <= LONGEST_TITLE else f'{title[:LONGEST_TITLE - 3]}...'), used


def _records(model_dir: epath.Path) -> list[dict[str, Any]]:
  source = model_dir / 'metrics.jsonl'
  records = read_jsonl(source) if source.exists() else []
  if not records:
    raise ConfigError(f'{source} has no metrics yet: nothing to plot.')
  return records


def _figure(width: float, height: float) -> Any:
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  figure = Figure(figsize=(width, height), dpi=120, layout='constrained')
  FigureCanvasAgg(figure)
  return figure


def _save(figure: Any, path: epath.Path) -> epath.Path:
  content = io.BytesIO()
  figure.savefig(content, format='png')
  files.write_atomically(path, content.getvalue())
  return path


def plot_loss(model_dir: Any) -> epath.Path:
  """Draws model_dir/loss.png from metrics.jsonl: the training loss, its running mean, evaluations, and where it went on with
  another run.

  Raises:
    ConfigError: there is nothing to draw.
  """
  model_dir = resolve(model_dir)
  everything = _records(model_dir)
  records = [record for record in everything if record.get('loss') is not None]
  joints = sorted({record['step'] for record in everything if record['split'] == JOINT})

  def points(split: str) -> list[tuple[int, float]]:
    return [(record['step'], record['loss']) for record in records if record['split'] == split]

  figure = _figure(8, 4.5)
  axes = figure.subplots()
  train, evaluation = points('train'), points('eval')
  if train:
    steps, losses = zip(*train)
    width = max(1, len(losses) // 20)
    means = [sum(losses[max(0, i - width + 1):i + 1]) / (i + 1 - max(0, i - width + 1)) for i in range(len(losses))]
    axes.plot(steps, losses, color='#9ecae1', linewidth=0.8, label='training')
    axes.plot(steps, means, color='#08519c', linewidth=1.8, label=f'training, mean of {width} points')
  if evaluation:
    steps, losses = zip(*evaluation)
    axes.plot(steps, losses, color='#d94801', marker='o', markersize=4, linewidth=1.2,
              label=f'evaluation, {losses[-1]:.3f} at step {steps[-1]}')
  for number, step in enumerate(joints):
    axes.axvline(step, color='#636363', linestyle='--', linewidth=1.0,
                 label='' if number else 'goes on from another run')
  name, families = _title(model_dir.name)
  axes.set(xlabel='step', ylabel='loss (nats per target token)')
  axes.set_title(f'{name}: loss', fontfamily=families, parse_math=False)  # a folder may have a dollar sign in its name
  axes.grid(alpha=0.3)
  figure.legend(loc='outside lower center', ncols=3)  # inside it would cover some curve
  return _save(figure, model_dir / 'loss.png')


def plot_experts(model_dir: Any) -> epath.Path | None:
  """Draws model_dir/experts.png: loads of experts by layer at the last step, and the greatest load and lost tokens over time.

  A load of 1 is the fair share.

  Returns:
    The path of the plot; None for a run without experts.
  """
  model_dir = resolve(model_dir)
  records = [record for record in _records(model_dir) if record['split'] == 'train']
  stacks = [name for name in ('encoder', 'decoder') if records and f'router/{name}/load' in records[-1]]
  wanted = [f'router/{stack}/{name}' for stack in stacks for name in ('load', 'left_behind')]
  records = [record for record in records if record.keys() >= set(wanted)]  # the others were damaged
  if not stacks:
    return None
  figure = _figure(4.5 * len(stacks) + 1, 7)
  panels = figure.subplots(2, len(stacks), squeeze=False)
  for (top, bottom), stack in zip(panels.T, stacks):
    shares = records[-1][f'router/{stack}/load']
    load = [[share * len(layer) for share in layer] for layer in shares]
    image = top.imshow(load, aspect='auto', cmap='RdBu_r', vmin=0, vmax=2, interpolation='nearest')
    top.set(title=f'{stack}: load at step {records[-1]["step"]}', xlabel='expert', ylabel='layer with experts')
    top.locator_params(integer=True)
    figure.colorbar(image, ax=top, label='of the fair share', extend='max')
    steps = [record['step'] for record in records]
    hottest = [max(max(layer) * len(layer) for layer in record[f'router/{stack}/load']) for record in records]
    left = [max(record[f'router/{stack}/left_behind']) for record in records]
    bottom.plot(steps, hottest, color='#d94801', label='hottest expert, of the fair share')
    bottom.plot(steps, left, color='#08519c', label='tokens left behind, worst layer')
    bottom.set(xlabel='step', ylim=(0, None))
    bottom.grid(alpha=0.3)
    bottom.legend(loc='lower center', bbox_to_anchor=(0.5, 1.0))  # inside it would cover some curve
  return _save(figure, model_dir / 'experts.png')
