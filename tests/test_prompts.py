"""infer.py's prompts: how they are given, checked, batched and written."""

import dataclasses
import io
import json
from pathlib import Path
import sys
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import infer
from tokenlora_jax.bank.bank import Bank
from tokenlora_jax.commands import generate as command
from tokenlora_jax.commands import prompts
from tokenlora_jax.commands.generate_args import Arguments
from tokenlora_jax.config import DataConfig, DecodeConfig, InputError
from tokenlora_jax.data.rows import Row
from tokenlora_jax.decoding import Decoder, generate, make_batches
from tokenlora_jax.files import NewLines
from tokenlora_jax.formats.load import load_base
from tokenlora_jax.formats.tokenizers import load_tokenizer
from tokenlora_jax.mixing.router import Router
from tokenlora_jax.mixing.routers import make_router
from tokenlora_jax.model.lora import random_adapters

TEMPLATE = (
  "{{ bos_token }}{% for m in messages %}"
  "{% if m.role == 'tool' %}{{ raise_exception('no\ntools') }}{% endif %}"
  "[{{ m.role }}]\n{{ m.content }}\n{% endfor %}"
  "{% if add_generation_prompt %}[assistant]\n{% endif %}"
)
NEW = 4


@pytest.fixture(scope="module")
def parts():
  """The base, its tokenizer and two random experts."""
  base = load_base("random:tiny", "float32")
  return base, load_tokenizer("random:tiny"), random_adapters(base, 2, 4)


@pytest.fixture
def run(parts, tmp_path, monkeypatch, capsys):
  """Runs infer.py on a bank of the experts; returns what it prints."""
  base, tokenizer, adapters = parts
  bank = Bank(adapters, "random:tiny", base.fingerprint, {})
  monkeypatch.setattr(command, "load", lambda _: (base, tokenizer, bank))
  monkeypatch.setattr(tokenizer, "chat_template", None)
  monkeypatch.chdir(tmp_path)

  def run(*argv):
    infer.main(
      [
        *("--config", "configs/tiny.py", "--router.name", "uniform"),
        *("--decode.max-new-tokens", str(NEW), *argv),
      ]
    )
    return capsys.readouterr()

  return run


def write(name, *lines):
  Path(name).write_text("".join(f"{line}\n" for line in lines))
  return name


def records(path="out.jsonl"):
  return [json.loads(line) for line in Path(path).read_text().splitlines()]


def asked(prompt):
  return json.dumps({"prompt": prompt})


def chat(*messages):
  messages = [{"role": role, "content": text} for role, text in messages]
  return json.dumps({"messages": messages})


# -----------------------------------------------------------------------------
# How they are given.


def test_prompts_with_newlines_come_as_json(run, monkeypatch):
  file = write("F.jsonl", asked("a\nb"), "", asked("é"))
  run("--prompts-file", file, "--output", "out.jsonl")
  assert [one["prompt"] for one in records()] == ["a\nb", "é"]
  lines = "".join(Path(file).read_text())
  monkeypatch.setattr(sys, "stdin", io.StringIO("\n" + lines))
  run("--output", "piped.jsonl")
  assert records("piped.jsonl") == records()
  # Other braces are text, and so is JSON in a file of lines.
  monkeypatch.setattr(sys, "stdin", io.StringIO('{"a": 1}\n{\n'))
  run("--output", "braces.jsonl")
  assert [r["prompt"] for r in records("braces.jsonl")] == ['{"a": 1}', "{"]
  run("--prompts-file", write("F.txt", asked("a")), "--output", "t.jsonl")
  assert [r["prompt"] for r in records("t.jsonl")] == [asked("a")]


def test_messages_are_written_with_the_chat_template(run, parts, monkeypatch):
  base, tokenizer, adapters = parts
  line = chat(("system", "be brief"), ("user", "hi\nyou"))
  file = write("F.jsonl", line, asked("plain"))
  refused(
    run, "--prompts-file", file,
    told=r"--prompts-file F.jsonl: prompt 1 has messages, and .* no chat templ",
  )  # fmt: skip
  monkeypatch.setattr(tokenizer, "chat_template", TEMPLATE)
  run("--prompts-file", file, "--output", "out.jsonl")
  first, second = records()
  text = "[system]\nbe brief\n[user]\nhi\nyou\n[assistant]\n"
  assert first["prompt"] == "<bos>" + text
  assert second["prompt"] == "plain"
  # One BOS: what the tokenizer puts before the rest of the text.
  out = generate(
    base, [tokenizer.encode(text)], adapters,
    make_router("uniform", experts=2), DecodeConfig(NEW), tokenizer,
  )  # fmt: skip
  assert first["tokens"] == out.tokens[0, : out.lengths[0]].tolist()
  write("F.jsonl", asked("a"), chat(("tool", "x")))
  told = r"F.jsonl: prompt 2: the base's chat template refuses .* \(no.*tools\)"
  refused(run, "--prompts-file", file, told=told)


@pytest.mark.parametrize(
  "line, told",
  [
    ("{", "is not JSON"),
    ("hello", "is not JSON"),
    ("[" * 100_000, "is not JSON"),
    ('"hello"', "is a text"),
    ("{}", "has no field"),
    ('{"promt": "a"}', "has promt"),
    ('{"prompt": "a", "id\\n": 1}', r"has id\\n, prompt"),
    ('{"prompt": "a", "messages": []}', "has messages, prompt"),
    ('{"prompt": 3}', "prompt is a number; want a text"),
    ('{"prompt": null}', "prompt is null"),
    ('{"messages": []}', "messages is empty"),
    ('{"messages": "hi"}', "messages is a text"),
    ('{"messages": [1]}', "message 1 is a number"),
    ('{"messages": [{"role": "user"}]}', "message 1 has role; want role and"),
    (
      '{"messages": [{"role": "user", "content": []}]}',
      "message 1: content is a list",
    ),
    (chat(("usr", "a")), "message 1: role: 'usr' .*did you mean 'user'"),
  ],
)
def test_lines_that_are_no_prompt_are_named(run, line, told):
  file = write("F.jsonl", "", asked("fine"), "", line)
  told = rf"--prompts-file F\.jsonl: line 4:? {told}"
  refused(run, "--prompts-file", file, "--output", "out.jsonl", told=told)


# -----------------------------------------------------------------------------
# All are checked before the first is made.


def refused(run, *argv, told):
  before = sorted(Path().iterdir())
  with pytest.raises(InputError, match=told) as caught:
    run(*argv)
  assert "\n" not in str(caught.value)
  assert sorted(Path().iterdir()) == before


def test_a_bad_prompt_is_named_before_any_is_made(run, monkeypatch, capsys):
  def never(*_, **__):
    raise AssertionError("a text was made")

  monkeypatch.setattr(command, "Decoder", never)
  long = "long " * 300
  out = ("--output", "out.jsonl")
  for name, bad, told in (
    ("F.txt", long, r"decode\.max-new-tokens: 4 after a prompt of 1501 tokens"),
    ("F.jsonl", asked(long), r"decode\.max-new-tokens: 4 after .* 1024 pos"),
    ("F.jsonl", asked(""), "is empty"),
    ("F.jsonl", '{"prompt": "\\ud83d"}', "text: character 0 is .* surrogate"),
  ):
    lines = ["a", "b"] if name == "F.txt" else [asked("a"), asked("b")]
    file = write(name, *lines, "", bad, lines[0])
    told = f"--prompts-file {name}: prompt 3: {told}"
    refused(run, "--prompts-file", file, *out, told=told)
  told = "--prompt: prompt 2: decode.max-new-tokens: 4 after"
  refused(run, "--prompt", "a", "--prompt", long, *out, told=told)
  refused(run, "--prompt", "", *out, told="--prompt: prompt 1: is empty")
  monkeypatch.setattr(sys, "stdin", io.StringIO(f"a\n{long}\n"))
  refused(run, *out, told="standard input: prompt 2: decode.max-new-tokens")
  assert "─" not in capsys.readouterr().out


def test_tokens_that_the_base_does_not_know_are_named(run, parts, monkeypatch):
  _, tokenizer, _ = parts
  encode = tokenizer.encode
  monkeypatch.setattr(
    tokenizer, "encode", lambda text, **how: [*encode(text, **how), 300]
  )
  refused(
    run, "--prompt", "a",
    told=r"--prompt: prompt 1: has tokens outside 0\.\.259",
  )  # fmt: skip


# -----------------------------------------------------------------------------
# Batches.


def test_batches_hold_each_prompt_once_in_few_shapes():
  rng = np.random.default_rng(0)
  for _ in range(50):
    lengths = rng.integers(1, 700, rng.integers(1, 40)).tolist()
    size = int(rng.integers(1, 20))
    found = make_batches(lengths, size)
    assert sorted(place for batch in found for place in batch) == list(
      range(len(lengths))
    )
    assert len(found) == -(-len(lengths) // size)
    assert max(map(len, found)) <= size
    # The next one that is missing is in the next batch.
    done = set()
    for batch in found:
      assert min(set(range(len(lengths))) - done) in batch
      done |= set(batch)


def test_texts_in_batches_are_those_made_one_at_a_time(run, parts):
  base, tokenizer, adapters = parts
  prompts = ["a", "word " * 30, "b" * 40, "cd", "word " * 25, "e", "fg"]
  file = write("F.jsonl", *map(asked, prompts))
  router = make_router("uniform", experts=2)
  config = DecodeConfig(NEW)
  alone = [
    generate(base, [prompt], adapters, router, config, tokenizer)
    for prompt in prompts
  ]
  shown = {}
  for size in ("1", "3", "16"):
    shown[size] = run(
      "--prompts-file", file, "--output", f"{size}.jsonl", "--decode.batch",
      size, "--html", f"{size}.html",
    ).out  # fmt: skip
    found = records(f"{size}.jsonl")
    assert [one["prompt"] for one in found] == prompts
    for one, out in zip(found, alone, strict=True):
      assert one["tokens"] == out.tokens[0, : out.lengths[0]].tolist()
      assert one["text"] == out.texts[0]
      assert one["gates"] == [[0.5, 0.5]] * len(one["tokens"])
      assert one["decode"]["batch"] == int(size)
    assert shown[size].count("led:") == len(prompts)
    assert shown[size].count("tokens/s") == 1
    # Each text is below its prompt.
    places = [shown[size].index(f"\n{one}\n") for one in ("a", "cd", "fg")]
    assert places == sorted(places)
  # The heat map is of the same texts, in the same order.
  pages = [Path(f"{size}.html").read_text("utf-8") for size in shown]
  assert pages[0] == pages[1] == pages[2]


def test_a_text_that_ends_early_is_cut_in_its_batch(run, parts, monkeypatch):
  tokenizer = parts[1]
  file = write("F.txt", "a", "b", "c", "d")
  run("--prompts-file", file, "--output", "free.jsonl")
  free = records("free.jsonl")
  end = free[0]["tokens"][1]
  monkeypatch.setattr(type(tokenizer), "eos_token_id", end, raising=False)
  run("--prompts-file", file, "--output", "ended.jsonl")
  for one, whole in zip(records("ended.jsonl"), free, strict=True):
    tokens = whole["tokens"]
    cut = tokens.index(end) + 1 if end in tokens else NEW
    assert one["tokens"] == tokens[:cut]
  assert len(records("ended.jsonl")[0]["tokens"]) < NEW


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sums(Router):
  """Gates from the sum of a text's letters; keeps how many it was asked."""

  turns: jax.Array
  needs = "text"
  experts = 2
  asked: ClassVar[list[int]] = []

  def observe(self, texts):
    self.asked.append(len(texts))
    return np.array([sum(map(ord, text)) % 97 for text in texts], np.float32)

  def gates(self, batch, observation, seen):
    del batch, seen
    return jax.nn.softmax(jnp.sin(observation[:, None] * self.turns))


@pytest.mark.parametrize("count", [5, 6, 7])
def test_a_router_that_reads_text_is_asked_about_those_that_go_on(
  count, parts, monkeypatch
):
  base, tokenizer, adapters = parts
  router, config = Sums(jnp.array([1.0, 2.0])), DecodeConfig(12, 1)
  # Of 6 and 7, five go on for a while, which is more than half of eight.
  prompts = ["a", "b", "cd", "efg", "h", "ij", "klm"][:count]

  def made(some):
    out = generate(base, some, adapters, router, config, tokenizer)
    return [(list(row.tokens), row.gates) for row in rows(out)]

  def rows(out):
    return [out.row(i) for i in range(len(out.lengths))]

  free = made(prompts)
  end = int(free[0][0][2])
  monkeypatch.setattr(type(tokenizer), "eos_token_id", end, raising=False)
  monkeypatch.setattr(Sums, "asked", [])
  together = made(prompts)
  counts = [len(tokens) for tokens, _ in together]
  # At the prompts all; then, a power of two, those that have not ended.
  want = [count]
  for n in range(1, max(counts)):
    left = sum(length > n for length in counts)
    want.append(min(1 << (left - 1).bit_length(), count))
  assert Sums.asked == want
  assert min(counts) < max(counts)
  for prompt, (tokens, gates) in zip(prompts, together, strict=True):
    ((alone, own),) = made([prompt])
    assert tokens == alone
    np.testing.assert_allclose(gates, own, atol=1e-6)


def test_one_prompt_streams_and_several_come_whole(run, monkeypatch):
  chunked = []

  class Told(Decoder):
    def __init__(self, *args, **kwargs):
      super().__init__(*args, **kwargs)
      chunked.append((len(args[1]), self._chunks_a_call))

  monkeypatch.setattr(command, "Decoder", Told)
  run("--prompt", "a")
  run("--prompt", "a", "--prompt", "b", "--prompt", "c", "--decode.batch", "2")
  assert chunked == [(1, 1), (2, 1), (2, 1)]


def test_compare_decodes_in_batches_in_the_prompts_order(run):
  argv = ("--compare", "--prompt", "a" * 40, "--prompt", "b", "--prompt", "cd")
  told = {size: run(*argv, "--decode.batch", size).out for size in "12"}
  assert told["1"] == told["2"]
  places = [told["2"].index(text) for text in ("a" * 40, "\nb\n", "\ncd\n")]
  assert places == sorted(places)
  assert told["2"].count("│ uniform ") == 3


# -----------------------------------------------------------------------------
# What is written meanwhile.


def test_output_grows_with_each_text_and_ctrl_c_says_by_how_many(
  run, monkeypatch
):
  begun, seen = [], []

  class Slow(Decoder):
    def __init__(self, *args, **kwargs):
      seen.append(len(records()))
      if len(begun) == 2:
        raise KeyboardInterrupt
      begun.append(1)
      super().__init__(*args, **kwargs)

  monkeypatch.setattr(command, "Decoder", Slow)
  # The third prompt is of another bucket, and in the batch before the second.
  file = write("F.txt", "a", "b" * 40, "c", "d" * 40, "e", "f")
  with pytest.raises(KeyboardInterrupt) as stop:
    run(
      "--prompts-file", file, "--output", "out.jsonl", "--decode.batch", "2",
    )  # fmt: skip
  assert str(stop.value) == "stopped; 4 of 6 texts are in out.jsonl"
  assert seen == [0, 1, 4]
  assert [one["prompt"][0] for one in records()] == list("abcd")


def test_lines_are_whole_or_absent(tmp_path, monkeypatch):
  path = tmp_path / "F"
  with NewLines("--output", str(path)) as lines:
    lines.add("é" * 3)
    assert path.read_bytes() == "ééé\n".encode()

    class Full:
      """A disk that takes a part of a line."""

      def __init__(self, file):
        self._file, self._room = file, 4

      def __getattr__(self, name):
        return getattr(self._file, name)

      def write(self, data):
        if not self._room:
          raise OSError(28, "No space left on device")
        self._room = 0
        return self._file.write(data[:4])

    whole = lines._file
    monkeypatch.setattr(lines, "_file", Full(whole))
    with pytest.raises(InputError, match=r"--output .*F: cannot .*No space"):
      lines.add("second line")
    assert path.read_bytes() == "ééé\n".encode()
    monkeypatch.setattr(lines, "_file", whole)
    lines.add("third")
  assert path.read_text() == "ééé\nthird\n"
  with pytest.raises(InputError, match="exists; choose a new file"):
    NewLines("--output", str(path))
  with NewLines("--output", str(tmp_path / "empty")):
    pass
  assert not (tmp_path / "empty").exists()


def test_rows_given_as_prompts_are_letters(parts, monkeypatch):
  """`<eos>` in a row of data is text; in a person's prompt it is a token."""
  base, tokenizer, _ = parts
  text = "a<eos>b"
  given = [
    prompts.Prompt("a person's", text),
    prompts.Prompt("a row's", text, letters=True),
  ]
  person, row = prompts.encode_all(given, tokenizer, base.config, NEW)
  assert person == (text, [1, 101, 2, 102])
  assert row == (text, [1, *(4 + byte for byte in text.encode())])
  rows = [Row(text, " c", "gsm8k:1")]
  monkeypatch.setattr(prompts, "load_rows", lambda *_: rows)
  data = DataConfig(tasks=("gsm8k",))
  (example,) = prompts.read_prompts(Arguments(examples=1, data=data))
  assert example.letters and example.content == text
