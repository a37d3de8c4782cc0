"""Templates of prompts: texts with `{fields}`, each of which occurs once."""

import re


def check(name: str, template: str, *fields: str) -> None:
  """Raises `ValueError` unless each of `fields` occurs in braces exactly once, and no other name.

  Braces around anything that is no name, such as JSON, are part of the text.

  Args:
    name: name of the template for the message, such as "data.revision_template".
    template: the text.
    *fields: names of fields, such as "prompt" and "answer".

  Example:
    >>> check("data.prompt_template", "{prompt} TL;DR:", "prompt")
  """
  for field in fields:
    count = template.count("{" + field + "}")
    if count != 1:
      raise ValueError(
        f"{name}={template!r} holds {{{field}}} {count} times: write it exactly once, in the place "
        f"of the {field}"
      )
  for other in re.findall(r"(?<!\{)\{([A-Za-z_]\w*)\}(?!\})", template):
    if other not in fields:
      raise ValueError(
        f"{name}={template!r} holds {{{other}}}, which nothing fills: its fields are "
        f"{', '.join('{' + field + '}' for field in fields)}"
      )


def fill(template: str, **values: str) -> str:
  """Returns the template with each field replaced; braces inside the values stay as they are.

  Example:
    >>> fill("A better ending than {answer}: {prompt}", prompt="The soup", answer="was {cold}")
    'A better ending than was {cold}: The soup'
  """
  pattern = "|".join(re.escape("{" + field + "}") for field in values)
  return re.sub(pattern, lambda match: values[match[0][1:-1]], template)
