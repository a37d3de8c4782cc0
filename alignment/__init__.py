"""Learning a policy over sequences from preferences, rewards or a preference game.

Each paper has one module, such as `ipo` or `copg`; `baselines` holds the methods that they are
compared with. The exact solutions are in `oracles` and `preference_games`. Import modules, not
symbols: `from alignment import ipo`.
"""
