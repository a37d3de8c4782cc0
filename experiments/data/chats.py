"""Conversations as prompts and completions: messages, in place of texts, in any row.

| a row has                                      | read as                                        |
|------------------------------------------------|------------------------------------------------|
| `prompt`, `completion`, ...: lists of messages | they are                                       |
| `prompt` a text, `chosen` the assistant's turn | the text is the user's message                 |
| `chosen` the whole conversation                | all but its last message is the prompt         |
| `messages`                                     | the last one, of the assistant, completes them |

A message is `{"role": "user", "content": "Hi"}`; the content may be a list of parts.

Each model reads a conversation in the format of its own chat template, so the template is applied
where texts become tokens (`prompt_text`, `completion_text`). Everything else (splits, caches,
rewards, reports) sees a `Chat` as a string: the contents of its messages.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from experiments.data import rows


class Chat(str):
  """Messages that read as text: the content of one message, or lines "role: content" of several.

  Attributes:
    messages: a list of `{"role": ..., "content": ...}`.

  Example:
    >>> Chat([{"role": "user", "content": "Hi"}])
    'Hi'
  """

  messages: list[dict[str, Any]]

  def __new__(cls, messages: Sequence[Mapping[str, Any]]) -> "Chat":
    contents = [_content(message) for message in messages]
    if len(messages) > 1:
      contents = [f"{m['role']}: {c}" for m, c in zip(messages, contents, strict=True)]
    chat = super().__new__(cls, "\n".join(contents))
    chat.messages = [dict(message) for message in messages]
    return chat


def read(value: Any, name: str, where: str) -> str:
  """Returns a text or a `Chat`; raises `ValueError` with its name and place for anything else."""
  if not (isinstance(value, list) and any(isinstance(message, Mapping) for message in value)):
    return rows.text(value, name, where)
  for i, message in enumerate(value):
    if not (isinstance(message, Mapping) and isinstance(message.get("role"), str)):
      raise ValueError(f"{where}: {name}[{i}] must be a message with a role and a content")
    content = message.get("content")
    parts = content if isinstance(content, list) else []
    if not isinstance(content, str) and not all(isinstance(x, Mapping) for x in parts or [0]):
      raise ValueError(
        f"{where}: {name}[{i}] has a content that is neither text nor a list of parts"
      )
  chat = Chat(value)
  rows.text(str(chat), name, where)
  return chat


def split(
  row: dict[str, Any], names: Sequence[str], where: str, *, prompt: str = "prompt"
) -> tuple[str, list[str]]:
  """Returns the prompt of a row and its completions, in the forms of the module's table.

  Args:
    row: fields by name.
    names: of the completions' fields.
    where: its place, for errors.
    prompt: name of the prompt's field.
  """
  if "messages" in row and not {prompt, *names} & row.keys():
    row = {name: row["messages"] for name in names}
  return join(
    read(row[prompt], prompt, where) if prompt in row else None,
    [read(rows.field(row, name, where), name, where) for name in names],
    where,
    missing=lambda: rows.field(row, prompt, where),
  )


def join(
  prompt: str | None, completions: list[str], where: str, *, missing: Any = None
) -> tuple[str, list[str]]:
  """Returns prompt and completions, what they share of a conversation moved to the prompt."""
  chats = [completion for completion in completions if isinstance(completion, Chat)]
  if prompt is None and len(chats) < len(completions):
    missing()  # raises
  if not chats:
    assert prompt is not None
    return prompt, completions
  before = prompt.messages if isinstance(prompt, Chat) else None
  first = chats[0].messages
  if before is None and (prompt is None or first[0]["role"] != "assistant"):
    before = first[:-1]
    if not before:
      missing()
  elif before is None:
    before = [{"role": "user", "content": str(prompt)}]
  found: list[str] = []
  for completion in completions:
    if isinstance(completion, Chat):
      messages = completion.messages
      messages = messages[len(before) :] if messages[: len(before)] == before else messages
      if not messages or any(m["role"] in ("user", "system") for m in messages):
        raise ValueError(
          f"{where}: the completion {str(completion)[:40]!r} must be the assistant's turn, or the "
          "whole conversation of its prompt and that turn"
        )
      completion = Chat(messages)
    found.append(completion)
  return Chat(before), found


def prompt_text(tokenizer: Any, prompt: str) -> str:
  """Returns a text unchanged, and a `Chat` in the model's format, up to the assistant's turn."""
  if not isinstance(prompt, Chat):
    return prompt
  return tokenizer.apply_chat(prompt.messages, add_generation_prompt=True)


def completion_text(tokenizer: Any, prompt: str | None, completion: str) -> str:
  """Returns the text of a completion after `prompt_text`, as the model's format continues it.

  Raises:
    ValueError: the chat template writes the prompt differently once an answer follows.
  """
  if not isinstance(prompt, Chat):
    return completion
  answer = (
    completion.messages
    if isinstance(completion, Chat)
    else [{"role": "assistant", "content": completion}]
  )
  before = prompt_text(tokenizer, prompt)
  whole = tokenizer.apply_chat([*prompt.messages, *answer], add_generation_prompt=False)
  if not whole.startswith(before):
    raise ValueError(
      "the chat template writes the prompt differently once an answer follows it, so there is no "
      "text of the answer alone: give the model a template without that, or plain texts"
    )
  return whole[len(before) :]


def _content(message: Mapping[str, Any]) -> str:
  content = message["content"]
  if isinstance(content, str):
    return content
  return "".join(part["text"] for part in content if isinstance(part.get("text"), str))
