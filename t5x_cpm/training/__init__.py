"""Training: one pure step function, and the loop around it.

`step.build` makes the step from configuration and mesh alone, so that training, ahead-of-time compilation, benchmarks and tests
call the same function; `train.run` is the loop. Nothing here imports TensorFlow.
"""
