"""The processes of one run: they start together, and stop together when one of them is lost.

`launch` finds out which process this is (`find_place`), joins the others and starts JAX (`together`). What the block inside
sees is a `Group`, which knows whether it is the first and is told what the process does. A process alone is a group too. The
folder knows nothing of what the processes do, and only `launch` imports JAX, inside its functions.
"""
