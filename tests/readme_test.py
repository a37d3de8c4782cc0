"""The Python example of the README runs as it stands and prints what the README says."""

import pathlib
import re

import numpy as np

README = (pathlib.Path(__file__).resolve().parent.parent / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_the_example_reaches_the_closed_form(capsys):
  (code,) = BLOCKS
  exec(compile(code, "README.md", "exec"), {"__name__": "readme"})
  printed = dict(re.findall(r"^(learned|closed form) *\[(.*)\]$", capsys.readouterr().out, re.M))
  learned, exact = (np.array(printed[name].split(), float) for name in ("learned", "closed form"))
  # Both are printed to three digits; Adam in float32 ends within 1e-4 of the optimum.
  np.testing.assert_allclose(learned, exact, rtol=0, atol=1.5e-3)
  (claimed,) = re.findall(r"It prints `\[(.*?)\]` twice", README)
  np.testing.assert_allclose(exact, np.array(claimed.split(), float), rtol=0, atol=1.5e-3)
