"""The processes of one run: they start together, and stop together when one of them is lost.

`launch` finds out where this process stands and starts JAX, `group` keeps the connection between the processes. A process alone
needs neither. Only `launch` imports JAX, inside the function that starts it.
"""
