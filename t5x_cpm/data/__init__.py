"""From a cache of tokens to the rows of a batch, which is a pure function of (configuration, seed, step). NumPy alone.

`reader.open_reader` gives the batches of a split. Below it, `pieces`, `pairs` and `streams` have one objective each: what is
looked up about the data (`index` stores it beside the cache) and how a row is made of it. `objectives` masks, `packing` says
which pieces share a row, and `cache` is the format of a cache. Nothing here makes a cache (`tasks.caches` does), imports JAX or
TensorFlow, or keeps a state between two batches.
"""
