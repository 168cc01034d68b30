"""From a cache of tokens to the rows of a batch, which is a pure function of (configuration, seed, step). NumPy alone.

`reader.open_reader` gives the batches of a split. Below it, `pieces`, `pairs` and `streams` hold the objectives: what each
looks up about the data (`index` stores it beside the cache) and how it makes a row of that; `rows` is what they share.
`objectives` masks, `packing` says which pieces share a row, and `cache` is the format of a cache. Nothing here makes a cache
(`tasks.caches` does), imports JAX or TensorFlow, or keeps state between two batches.
"""
