"""Speed and memory of this package beside their references: `infovla bench train|act|rollout|data|memory`.

Not to be confused with `infovla_peft.benchmark`, which compares continual-learning *methods* by what they remember.
Here nothing is learned: ours and a reference (plain replay, the method as the paper words it, the physics alone, a
plain loop) do the same work side by side, and what counts is the ratio. Nothing in the package imports this one
except the command line.
"""
