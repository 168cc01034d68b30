"""What is typed: `t5x_cpm MODE --flag=value --gin.CLASS.FIELD=VALUE`.

`modes` is the table of modes, one row each: a new mode is a row there and a function. `parse` reads a command line by that
table and writes the help, `configure` makes the configuration that a mode gets. Importing them imports neither JAX nor
TensorFlow, so that help and mistakes are told at once; every mode imports what it runs.
"""
