"""Reads the text of compiled programs."""

import re


def exchanged_shapes(text: str) -> set[tuple[int, ...]]:
  """Returns the shapes of all arrays that devices send to each other."""
  kinds = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
  results = re.findall(rf"= (.*?) (?:{kinds})(?:-start)?\(", text)
  shapes = [shape for result in results for shape in re.findall(r"\w+\[([\d,]*)\]", result)]
  return {tuple(map(int, filter(None, shape.split(",")))) for shape in shapes}
