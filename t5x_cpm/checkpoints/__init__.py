"""What a run leaves on disk: its model_dir, its checkpoints, and single arrays read out of them.

`run_directory` says what lies where and whose it is, `manager` saves and restores training state, `arrays` reads parameters
alone, and `tensors` streams them slice by slice. `readers` does so for the files of other programs, `convert`, `export`,
`huggingface` and `cpm2` exchange models with them, and `inspection` shows what any of them holds; nothing else here knows a
model, and nothing knows a training loop.
"""
