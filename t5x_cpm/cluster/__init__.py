"""The processes of one run: they start together, and stop together when one of them is lost.

`launch` finds out which process this is (`find_member`), joins the others and starts JAX (`together`). The block inside gets a
`Group`, which says whether this process is the first, and is told what it is doing. A process alone is a group too. The
processes know each other by a secret (`secret`): a stranger at the port of process 0 (`door`) is told nothing and ends nothing.
The folder knows nothing of what the processes do, and only `launch` imports JAX, inside its functions.
"""
