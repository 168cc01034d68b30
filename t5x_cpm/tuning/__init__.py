"""Tuning: a small delta on a frozen base.

`build_model` gives the model of a run, with the delta that DeltaConfig names. A method is one file with a function that is
registered by name; one of your own is registered by a module that --import names. Nothing here knows how a step trains, or how
answers are made.
"""

from t5x_cpm.tuning import adapter, bitfit, ia3, lora, prefix, prompt, slots  # noqa: F401  # they register themselves
from t5x_cpm.tuning.base import Base, find, fingerprint, held, load, load_whole
from t5x_cpm.tuning.files import Saved, fitted, read, write
from t5x_cpm.tuning.methods import METHODS, Method, build_model, register

__all__ = [
    'METHODS', 'Base', 'Method', 'Saved', 'build_model', 'find', 'fingerprint', 'fitted', 'held', 'load', 'load_whole',
    'prompt', 'read', 'register', 'slots', 'write']
