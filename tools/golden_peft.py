"""Makes tests/golden/peft.npz: what the library peft computes with adapters on the T5 of tests/golden/t5_parity.npz.

    pip install -e .[torch] && python tools/golden_peft.py

Weights, inputs and targets are those of that file. The file made here holds, of each adapter, what `save_pretrained` has
written, and the logits. Adapters are drawn so large that a scale or a transposition that is wrong shows in every logit.
"""

import importlib.util
import json
import pathlib
import tempfile
from typing import Any

import numpy as np

from t5x_cpm.cli.errors import run_script
from t5x_cpm.cli.parse import Parser
from t5x_cpm.config import ConfigError

SEED = 7
GOLDEN = pathlib.Path(__file__).resolve().parent.parent / 'tests' / 'golden'
LORA = {'r': 3, 'lora_alpha': 5, 'task_type': 'SEQ_2_SEQ_LM'}
ADAPTERS: dict[str, tuple[str, dict[str, Any]]] = {
    'lora': ('LoraConfig', LORA | {'target_modules': ['q', 'v']}),
    'rslora': ('LoraConfig', LORA | {'target_modules': ['k', 'o', 'wi_0', 'wi_1', 'wo'], 'use_rslora': True}),
    'prompt': ('PromptTuningConfig', {'num_virtual_tokens': 4, 'task_type': 'SEQ_2_SEQ_LM'})}


def base(t5: dict[str, np.ndarray]) -> Any:
  """The T5 of t5_parity.npz, as `golden_t5.make` had it."""
  import torch
  import transformers

  config = json.loads(str(t5['config']))
  model = transformers.T5ForConditionalGeneration(transformers.T5Config(**config)).eval()
  if not config['tie_word_embeddings']:
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
  with torch.no_grad():
    for name, value in model.named_parameters():
      value.copy_(torch.from_numpy(t5[f'weight/{name}']))
  return model


def logits(model: Any, t5: dict[str, np.ndarray]) -> np.ndarray:
  """The logits [rows, T, V] of a model of peft for the inputs and targets of t5_parity.npz."""
  import torch

  given = {name: torch.from_numpy(t5[name].astype(np.int64)) for name in ('input_ids', 'attention_mask', 'decoder_input_ids')}
  with torch.no_grad():
    return model(**given).logits.numpy()


def make(t5: dict[str, np.ndarray], name: str) -> dict[str, Any]:
  """'config' (JSON), 'tensor/NAME' by the names of peft, and 'logits' of one of ADAPTERS."""
  import peft
  import safetensors.numpy
  import torch

  kind, options = ADAPTERS[name]
  rng = np.random.default_rng(SEED)
  model = peft.get_peft_model(base(t5), getattr(peft, kind)(**options)).eval()
  with torch.no_grad():
    for _, value in sorted((name, value) for name, value in model.named_parameters() if value.requires_grad):
      drawn = rng.standard_normal(tuple(value.shape)) * (1.0 if name == 'prompt' else 0.3)
      value.copy_(torch.from_numpy(drawn.astype(np.float32)))
  with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder)
    tensors = safetensors.numpy.load_file(pathlib.Path(folder) / 'adapter_model.safetensors')
    config = (pathlib.Path(folder) / 'adapter_config.json').read_text()
  return {'config': np.asarray(config), 'logits': logits(model, t5)} | {f'tensor/{key}': x for key, x in tensors.items()}


def main() -> None:
  parser = Parser(description=(__doc__ or '').split('\n')[0])
  parser.add_argument('--output', type=pathlib.Path, default=GOLDEN, help='folder')
  given = parser.parse_args()
  if missing := [name for name in ('torch', 'transformers', 'peft') if not importlib.util.find_spec(name)]:
    raise ConfigError(f'{" and ".join(missing)} must be installed: pip install -e .[torch]')
  import peft
  import torch

  with np.load(GOLDEN / 't5_parity.npz') as file:
    t5 = dict(file)
  result: dict[str, Any] = {'versions': np.asarray(f'torch {torch.__version__}, peft {peft.__version__}, seed {SEED}')}
  for name in ADAPTERS:
    result |= {f'{name}/{key}': value for key, value in make(t5, name).items()}
    print(f'{name}: the logits differ from those of the base by {np.abs(result[f"{name}/logits"] - t5["logits"]).max():.2f}')
  given.output.mkdir(parents=True, exist_ok=True)
  path = given.output / 'peft.npz'
  np.savez_compressed(path, **result)
  print(f'{path}: {path.stat().st_size / 1e3:.0f} kB, {result["versions"]}')


if __name__ == '__main__':
  run_script(main)
