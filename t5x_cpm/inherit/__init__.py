"""Knowledge inheritance: a new model begins with what a trained one has learned.

`grow` makes the parameters of a larger model from those of a smaller one, slice by slice, and writes them as a run directory,
which `train --init_from` reads. What can grow is a table of functions in `growth`. Nothing here trains.
"""

from t5x_cpm.inherit.growth import GROWTH
from t5x_cpm.inherit.run import grow
from t5x_cpm.inherit.stage import Stage

__all__ = ['GROWTH', 'Stage', 'grow']
