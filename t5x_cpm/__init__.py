"""t5x_cpm: large encoder-decoder language models at a cost that a small team can pay.

From Python: `train`, `load`, `evaluate`, `Config` and `ConfigError`. Each is imported when it is first used.
"""

__version__ = '0.1.0'

_LAZY = {'Config': 'config', 'ConfigError': 'config', 'evaluate': 'api', 'load': 'api', 'train': 'api'}  # name -> module


def __getattr__(name):  # untyped: checkers take what it gives as it comes
  if name not in _LAZY:
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
  import importlib

  return getattr(importlib.import_module(f'{__name__}.{_LAZY[name]}'), name)


def __dir__() -> list[str]:
  return sorted([*globals(), *_LAZY])
