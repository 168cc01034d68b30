"""From a cache of tokens to the rows of a batch: a pure function of (configuration, seed, step), in numpy.

`cache` is the format of a cache (`tasks.caches` makes one), `index` and `rows` find what a row of one task's stream holds,
`objectives` masks it, and `reader` puts the rows of a mixture together. Nothing here imports JAX or TensorFlow.
"""
