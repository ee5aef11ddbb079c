"""Reads a command's prompts, formats chats, tokenizes and checks them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import json
from pathlib import Path
import sys
from typing import Any, NamedTuple

import jinja2

from tokenlora_jax.commands.generate_args import Arguments
from tokenlora_jax.config import InputError, check_choice
from tokenlora_jax.data.rows import load_rows
from tokenlora_jax.data.tokens import Tokenizer
from tokenlora_jax.decoding import encode_checked
from tokenlora_jax.files import numbered_lines
from tokenlora_jax.model.config import LlamaConfig

ROLES = ("system", "user", "assistant", "developer", "tool")

_WANT = (
  'want {"prompt": "..."} or {"messages": [{"role": "...", "content": "..."}]}'
)


class Prompt(NamedTuple):
  """One prompt, before formatting.

  Attributes:
    name: of the prompt, in errors.
    content: its text, or a chat's messages [{"role": ..., "content": ...}].
    letters: whether it is a row of data, whose `</s>` is four letters and not a
      control token.
  """

  name: str
  content: str | Sequence[Mapping[str, str]]
  letters: bool = False


def read_prompts(args: Arguments) -> list[Prompt]:
  """Returns the prompts of a command line, or of standard input.

  Args:
    args: their `prompt`, `prompts_file` and `examples` are joined.

  Raises:
    InputError: there is no prompt, or one cannot be read.
  """
  if args.examples < 0:
    raise InputError(
      f"--examples: {args.examples} is not allowed; want 0 or more"
    )
  prompts = [
    Prompt(f"--prompt: prompt {i}", text)
    for i, text in enumerate(args.prompt, 1)
  ]
  if args.prompts_file:
    file = Path(args.prompts_file)
    name = f"--prompts-file {file}"
    lines = numbered_lines(file, name, "prompt")
    prompts += _prompts(name, lines, file.suffix.lower() == ".jsonl")
  for task in args.data.tasks if args.examples else ():
    rows = load_rows(args.data, task, "test")[: args.examples]
    prompts += [
      Prompt(f"--examples {task}: prompt {i}", row.prompt, letters=True)
      for i, row in enumerate(rows, 1)
    ]
  if prompts:
    return prompts
  if sys.stdin.isatty():
    raise InputError("--prompt: no prompt is given; give one, or --examples 1")
  name = "standard input"
  lines = numbered_lines(sys.stdin, name, "prompt")
  return _prompts(name, lines, _is_row(lines[0][1]))


def _is_row(line: str) -> bool:
  """Returns whether a line is a prompt as JSON, not as text."""
  try:
    row = json.loads(line)
  except (ValueError, RecursionError):
    return False
  return isinstance(row, dict) and bool(row.keys() & {"prompt", "messages"})


def _prompts(
  name: str, lines: Sequence[tuple[int, str]], as_json: bool
) -> list[Prompt]:
  return [
    Prompt(
      f"{name}: prompt {i}",
      _content(f"{name}: line {number}", line) if as_json else line,
    )
    for i, (number, line) in enumerate(lines, 1)
  ]


def _content(where: str, line: str) -> str | list[dict[str, str]]:
  """Returns the prompt or messages of a JSON line, or raises `InputError`."""
  try:
    row = json.loads(line)
  except (ValueError, RecursionError) as error:
    why = getattr(error, "msg", "too deep")
    raise InputError(f"{where}: is not JSON ({why}); {_WANT}") from None
  if not isinstance(row, dict):
    raise InputError(f"{where}: is {_kind(row)}; {_WANT}")
  if row.keys() == {"prompt"}:
    return _text(f"{where}: prompt", row["prompt"])
  if row.keys() != {"messages"}:
    fields = ", ".join(sorted(row)) or "no field"
    raise InputError(f"{where}: has {_short(fields)}; {_WANT}")
  messages = row["messages"]
  if not isinstance(messages, list) or not messages:
    got = "empty" if messages == [] else _kind(messages)
    raise InputError(f"{where}: messages is {got}; {_WANT}")
  for i, message in enumerate(messages, 1):
    at = f"{where}: message {i}"
    if not isinstance(message, dict):
      raise InputError(f"{at} is {_kind(message)}; {_WANT}")
    if message.keys() != {"role", "content"}:
      fields = ", ".join(sorted(message)) or "no field"
      raise InputError(f"{at} has {_short(fields)}; want role and content")
    _text(f"{at}: content", message["content"])
    check_choice(f"{at}: role", _text(f"{at}: role", message["role"]), ROLES)
  return messages


def _text(where: str, value: Any) -> str:
  if not isinstance(value, str):
    raise InputError(f"{where} is {_kind(value)}; want a text")
  return value


def _kind(value: Any) -> str:
  """Returns JSON's name for a value's type."""
  kinds = {dict: "an object", list: "a list", str: "a text", type(None): "null"}
  kinds |= {bool: "true or false"}
  return kinds.get(type(value), "a number")


def _short(text: str) -> str:
  """Returns a foreign text as one line of at most 80 characters."""
  text = " ".join(ascii(text)[1:-1].split())
  return text if len(text) <= 80 else f"{text[:77]}..."


def as_text(prompt: Prompt, tokenizer: Tokenizer) -> str:
  """Returns a prompt as text, formatting messages with the chat template.

  Args:
    prompt: text or messages; after messages the assistant's turn is opened.
    tokenizer: of the base.

  Raises:
    InputError: there is no chat template, or it refuses the messages.

  Example:
    >>> from tokenlora_jax import load_tokenizer
    >>> as_text(Prompt("prompt 1", "2 + 2 ="), load_tokenizer("random:tiny"))
    '2 + 2 ='
  """
  if isinstance(prompt.content, str):
    return prompt.content
  if getattr(tokenizer, "chat_template", None) is None:
    raise InputError(
      f"{prompt.name} has messages, and the base's tokenizer has no chat"
      ' template; want {"prompt": "..."}'
    )
  try:
    return tokenizer.apply_chat_template(
      prompt.content, tokenize=False, add_generation_prompt=True
    )
  # A template is a foreign program, and may raise these.
  except (jinja2.TemplateError, ValueError, TypeError) as error:
    raise InputError(
      f"{prompt.name}: the base's chat template refuses its messages"
      f" ({_short(str(error))})"
    ) from None


def encode_all(
  prompts: Sequence[Prompt],
  tokenizer: Tokenizer,
  shape: LlamaConfig,
  new: int,
) -> list[tuple[str, list[int]]]:
  """Formats, tokenizes and checks all prompts before the first is decoded.

  Args:
    prompts: of a command.
    tokenizer: of the base.
    shape: of the base.
    new: the most tokens generated after each.

  Returns:
    [(text, tokens)], one per prompt.

  Raises:
    InputError: a prompt, named, is empty, too long or not encodable.
  """
  encoded = []
  for prompt in prompts:
    text = as_text(prompt, tokenizer)
    if not text:
      raise InputError(f"{prompt.name}: is empty")
    try:
      tokens = encode_checked(text, tokenizer, shape, new, prompt.letters)
    except InputError as error:
      raise InputError(f"{prompt.name}: {error}") from None
    encoded.append((text, tokens))
  return encoded
