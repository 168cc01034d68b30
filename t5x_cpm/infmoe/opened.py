"""Opens a bundle to run it."""

from typing import Any

import jax

from t5x_cpm.config import Config
from t5x_cpm.infmoe.bundle import REST, Bundle, Place, place_of
from t5x_cpm.infmoe.formats import FORMATS
from t5x_cpm.infmoe.run import Run
from t5x_cpm.infmoe.stages import Stages
from t5x_cpm.infmoe.stores import Mapped
from t5x_cpm.models import encoder_decoder
from t5x_cpm.models.component import Params
from t5x_cpm.models.layers import compute_dtype
from t5x_cpm.trees import nested


def _weights(bundle: Bundle, config: Config, device: Any) -> tuple[Params, dict[Place, Params]]:
  """The parameters that belong to no layer, and by place those of layers but for their experts, as they are computed with."""
  dtype = compute_dtype(config.model)

  def read(file: str, name: str, casts: bool) -> jax.Array:
    value = bundle.tensor(file, name)
    return jax.device_put(value.astype(dtype) if casts and value.dtype != dtype else value, device)

  model = bundle.model
  rest = nested({name: read(REST, name, True) for name, entry in bundle.entries[REST].items() if entry.leaf})
  weights: dict[Place, Params] = {}
  for stack in model.stacks:
    for layer in model.layers[stack]:
      place = place_of(layer)
      if place not in weights:
        casts = {role: component.cast for role, (component, _) in layer.roles.items()}
        weights[place] = nested({
            name: read(place.file, name, casts[name.partition('/')[0]])
            for name, entry in bundle.entries[place.file].items() if entry.leaf and not entry.part})
  return rest, weights


def open_bundle(path: Any, config: Config) -> Run:
  """The model of a bundle, ready to run on the first device of this process.

  Args:
    path: of the bundle.
    config: of its run, with how it is to be run.

  Raises:
    CheckpointError: it is damaged.
  """
  device = jax.local_devices()[0]
  bundle = Bundle(path, encoder_decoder.build(config.model))
  rest, weights = _weights(bundle, config, device)
  return Run(Stages(bundle.model, FORMATS[bundle.format], rest, weights), Mapped(bundle, device))
