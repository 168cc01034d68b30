"""The command line: `t5x_cpm MODE --flag=value --gin.CLASS.FIELD=VALUE`.

`modes` is the table of modes: a new mode is one row there and a function. `parse` reads a command line by that table and
writes the help, `configure` makes the configuration that a mode gets, and `errors` says which errors are reported in one line.
Importing them imports neither JAX nor TensorFlow, so that help and mistakes appear at once; every mode imports what it runs.
"""
