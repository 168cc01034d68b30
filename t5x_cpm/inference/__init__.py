"""A trained model at work: it generates, scores, chooses, encodes and is evaluated.

    engine = t5x_cpm.inference.load('runs/quickstart/model')
    engine.generate(['今天天气很<span>。'])  # a list of one answer, as for generate('今天天气很<span>。')

The folder offers `load`, which makes an `Engine` from a model_dir, and the modes `infer` and `eval`. Between an engine and a
model stands a `Program` (programs.py), so that the engine does not know where the parameters lie. Nothing here changes a
parameter or writes a checkpoint, and only the evaluation of tasks with SeqIO metrics imports TensorFlow.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from collections.abc import Mapping

  from t5x_cpm.config import Config
  from t5x_cpm.inference.engine import Engine


def load(model_dir: Any, *, step: int | None = None, config: 'Config | None' = None,
         deltas: 'Mapping[str, Any] | None' = None, memory_gib: float | None = None) -> 'Engine':
  """Loads a trained model.

  Args:
    model_dir: the run's directory, or that of a bundle.
    step: the step of the checkpoint; by default the last.
    config: says how to decode, with which lengths and on which mesh (without MeshConfig.host_gib, which is for training
      alone); by default as the run says, with all devices of this process along `data`.
    deltas: by name, the model_dir of each delta to serve beside the model.
    memory_gib: of a bundle: what the model may take in memory, in place of OffloadConfig.memory_gib.

  Returns:
    An engine with `generate`, `score`, `choose`, `encode` and `stream`.

  Raises:
    ConfigError: there is no such checkpoint, or it is damaged; or a delta is, or belongs to another base or vocabulary.
  """
  from t5x_cpm.inference import engine  # JAX is imported here, not by `import t5x_cpm.inference`

  return engine.load(model_dir, step=step, config=config, deltas=deltas, memory_gib=memory_gib)
