"""Games as arrays: exact values, methods that converge to equilibria, and ARMAC with networks.

`games` compiles a game of OpenSpiel to arrays and evaluates policies in it; `cfr` and `mccfr` solve
it. Import modules, not symbols: `from rl_theory import games`.
"""
