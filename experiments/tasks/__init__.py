"""What runs on one kind of problem share: bandits, games, graphs, language, preferences, digits."""
