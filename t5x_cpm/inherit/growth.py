"""What can grow: a table of functions, each of which makes of a model that is read slice by slice another one.

A function changes the description of the model and how its slices are read, and says what it keeps of what the model computes.
"""

from collections.abc import Callable

from t5x_cpm.config import Config
from t5x_cpm.inherit import average, depth, experts, vocabulary, width
from t5x_cpm.inherit.stage import Stage
from t5x_cpm.vocabularies import Vocabulary

GROWTH: dict[str, Callable[[Stage, Config, Vocabulary], Stage]] = {
    'vocabulary': vocabulary.grow_vocabulary,
    'unshare_layers': depth.unshare_layers,
    'deepen': depth.deepen,
    'widen': width.widen,
    'experts': experts.grow_experts,
    'prune_experts': experts.prune_experts,
    'average': average.average,
    'merge_models_into_experts': experts.merge_models,
}
OF_SEVERAL = ('average', 'merge_models_into_experts')  # what makes one model of several sources
