"""Learning a policy over sequences from preferences, rewards or a preference game.

One module a paper (`ipo`, `copg`), what they are compared with in `baselines`, the exact answers
in `oracles`. Import modules, not symbols: `from alignment import ipo`.
"""
