"""Tests of data.templates."""

import pytest

from experiments.data import templates


@pytest.mark.parametrize(
  "template", ["{prompt}", 'As {"json": 1}, {prompt}', "{{x}} {prompt} {} {1}", "x { y } {prompt}"]
)
def test_braces_that_hold_no_name_are_text(template):
  templates.check("t", template, "prompt")
  assert templates.fill(template, prompt="soup") == template.replace("{prompt}", "soup")


@pytest.mark.parametrize(
  ("template", "words"),
  [
    ("{prompt} {x}", r"holds \{x\}, which nothing fills: its fields are \{prompt\}"),
    ("{prompt} {prompt}", r"holds \{prompt\} 2 times"),
    ("prompt", r"holds \{prompt\} 0 times"),
  ],
)
def test_a_template_with_other_fields_is_refused(template, words):
  with pytest.raises(ValueError, match=words):
    templates.check("t", template, "prompt")
