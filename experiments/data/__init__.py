"""Data of the experiments: prompts, pairs, rewards, graphs, pretrained weights and batches."""
