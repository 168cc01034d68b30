"""The models: pure functions of plain trees of parameters, for any mesh.

A layer has two halves, `before` its feed-forward network and `after` it; what lies between is injected, so that training,
tests and engines that hold experts elsewhere run the same layer. Nothing here knows a task, a training loop or a file.
"""
