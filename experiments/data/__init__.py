"""Where experiments get prompts, rewards, pretrained weights and batches from."""
