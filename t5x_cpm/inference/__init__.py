"""Answers from a trained model, in Python:

    engine = t5x_cpm.inference.load('runs/quickstart')
    engine.generate(['今天天气很<span>。'])
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from t5x_cpm.config import Config
  from t5x_cpm.inference.engine import Engine


def load(model_dir: Any, *, step: int | None = None, config: 'Config | None' = None) -> 'Engine':
  """Loads a trained model.

  Args:
    model_dir: of the run.
    step: of the checkpoint; default the last.
    config: its decode, infer and mesh parts are used (MeshConfig.host_gib is of training alone); default those of the run, on
      all devices of this process along `data`.

  Returns:
    An engine with `generate`, `score`, `choose`, `encode` and `stream`.

  Raises:
    ConfigError: there is no such checkpoint, or it is damaged.
  """
  from t5x_cpm.inference import engine  # JAX is imported here, not by `import t5x_cpm.inference`

  return engine.load(model_dir, step=step, config=config)
