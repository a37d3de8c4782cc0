"""Networks for `representation`, the only files in it with Flax."""
