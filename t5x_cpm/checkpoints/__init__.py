"""What a run leaves on disk: its model_dir, its checkpoints, and single arrays read out of them.

`run_directory` says what lies where and whose it is, `manager` saves and restores training state, `arrays` reads parameters
alone. Nothing here knows a model or a training loop.
"""
