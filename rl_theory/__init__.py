"""Games and Markov chains as arrays: exact values, and methods that converge to their equilibria.

`games` compiles a game of OpenSpiel to arrays and says what a policy is worth in it; `cfr` and
`mccfr` solve it. Import modules, not symbols: `from rl_theory import games`.
"""
