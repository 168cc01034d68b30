"""Opens a bundle to run it."""

from typing import Any

import jax

from t5x_cpm.config import Config, ConfigError
from t5x_cpm.infmoe import budget as budget_lib
from t5x_cpm.infmoe.about import STORED
from t5x_cpm.infmoe.bundle import REST, Bundle, Place, place_of
from t5x_cpm.infmoe.formats import Stored
from t5x_cpm.infmoe.run import Run
from t5x_cpm.infmoe.stages import Stages, Weights
from t5x_cpm.infmoe.stores import Mapped, Slots, Store
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
        found: dict[str, Any] = {}
        for name, entry in bundle.entries[place.file].items():
          if entry.part and not entry.expert:
            matrix = found.setdefault(name.rpartition('/')[0], Stored({}, bundle.given.dense_format))
            matrix.parts[entry.part] = read(place.file, name, False)
          elif entry.leaf and not entry.expert:
            found[name] = read(place.file, name, casts[name.partition('/')[0]])
        weights[place] = nested(found)
  return rest, weights


def open_bundle(path: Any, config: Config) -> Run:
  """The model of a bundle, ready to run on the first device of this process.

  Args:
    path: of the bundle.
    config: of its run, with how it is to be run.

  Raises:
    ConfigError: it is damaged or stored in another format, or there is too little memory.
  """
  device, given = jax.local_devices()[0], config.offload
  bundle = Bundle(path, encoder_decoder.build(config.model))
  for name in STORED:
    if getattr(given, name) != bundle.about[name] and (name != 'group' or 'int4' in (given.format, given.dense_format)):
      raise ConfigError(f'OffloadConfig.{name} = {getattr(given, name)!r}: {path} is stored with {bundle.about[name]!r}. Make '
                        'another bundle, or leave it as it is.')
  rest, weights = _weights(bundle, config, device)
  dense = sum(array.nbytes for array in jax.tree.leaves((rest, weights)))
  budget = budget_lib.choose(bundle, config, dense)
  budget_lib.tell(budget, bundle, config)
  store: Store = Mapped(bundle, device)
  if budget.staging:
    store = Slots(bundle, device, budget.staging, budget.kept, given.readers, given.read_seconds)
  return Run(Stages(bundle.model, given.format), Weights(rest, weights, {}), store, given)
