"""The configuration of a run: frozen dataclasses that gin sets field by field, or Python builds.

`model` and `run` hold the classes, `fields` and `typed` what they are written with. `row_features` names what a row carries
beside its tokens, `gin` reads files and flags, and `describe` explains every field. A value of the wrong type is refused when a
class is made; every class checks its own values in `validate()`. Nothing here imports JAX or TensorFlow, so that a bad
configuration is refused before any device work.
"""

from t5x_cpm.config.delta import DeltaConfig
from t5x_cpm.config.fields import ConfigError
from t5x_cpm.config.inherit import InheritConfig
from t5x_cpm.config.model import ModelConfig, MoEConfig
from t5x_cpm.config.offload import OffloadConfig
from t5x_cpm.config.run import (
    CheckpointConfig,
    Config,
    DecodeConfig,
    EvalConfig,
    InferConfig,
    MeshConfig,
    MetricsConfig,
    OptimizerConfig,
    ProcessesConfig,
    TrainConfig,
    from_dict,
    identity_differences,
    to_dict,
)
from t5x_cpm.config.task import LocalTaskConfig, TaskConfig
from t5x_cpm.config.teacher import TeacherConfig

__all__ = [
    'CheckpointConfig', 'Config', 'ConfigError', 'DecodeConfig', 'DeltaConfig', 'EvalConfig', 'InferConfig',
    'InheritConfig',
    'LocalTaskConfig', 'MeshConfig', 'MetricsConfig', 'ModelConfig', 'MoEConfig', 'OffloadConfig', 'OptimizerConfig',
    'ProcessesConfig', 'TaskConfig', 'TeacherConfig', 'TrainConfig', 'from_dict', 'identity_differences', 'to_dict']
