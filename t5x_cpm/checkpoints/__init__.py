"""What a run leaves on disk: its model_dir, its checkpoints, and single arrays read out of them.

`run_directory` says what lies where and whose it is, `manager` saves and restores training state, `arrays` reads parameters
alone. `convert` and `huggingface` exchange models with transformers; nothing else here knows a model, and
nothing knows a training loop.
"""
