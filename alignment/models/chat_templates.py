"""Chat templates of models: Jinja sources, rendered as `transformers` renders them."""

import datetime
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox


def render(
  source: str, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool, **tokens: str
) -> str:
  """Returns a conversation as text.

  Args:
    source: the template.
    messages: `{"role": "user", "content": "Hello"}` and so on.
    add_generation_prompt: end with the opening of the assistant's turn.
    **tokens: special tokens by the names that templates use, such as `bos_token`.

  Raises:
    ValueError: the template is not Jinja, or refuses the messages.

  Example:
    >>> render("{% for m in messages %}{{ m.content + eos_token }}{% endfor %}",
    ...        [{"role": "user", "content": "Hi"}], add_generation_prompt=True, eos_token="</s>")
    'Hi</s>'
  """
  try:
    return _template(source).render(
      messages=list(messages),
      tools=None,
      documents=None,
      add_generation_prompt=add_generation_prompt,
      **tokens,
    )
  # Templates are programs: one that is handed parts where it adds texts ends in a TypeError.
  except (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
    raise ValueError(f"the chat template refuses these messages: {error}") from error


class _Generation(jinja2.ext.Extension):
  """The block `{% generation %}`, which marks the assistant's words: its body is rendered."""

  tags: set[str] = {"generation"}  # noqa: RUF012 (so declared in Jinja)

  def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
    line = next(parser.stream).lineno
    body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
    # As a call block, so that names set inside stay inside, as in transformers.
    return jinja2.nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

  def _body(self, caller: Callable[[], str]) -> str:
    return caller()


@functools.lru_cache(maxsize=16)
def _template(source: str) -> jinja2.Template:
  # Sandboxed: templates come with the weights, and anyone may have written them.
  environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
  )

  def raise_exception(message):
    raise jinja2.TemplateError(message)

  environment.globals["raise_exception"] = raise_exception
  environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
  environment.filters["tojson"] = _to_json
  return environment.from_string(source)


def _to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
  # Jinja's own filter escapes HTML characters; the arguments are those of transformers.
  return json.dumps(
    value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
  )
