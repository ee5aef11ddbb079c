"""Loads damaged files: each must load or be refused in one line.

  python -m benchmarks.hostile --cases 10000 --seed 0

A seeded script damages small valid files (a base as a Hugging Face folder and
as GGUF, an adapter, a bank, rows, a tokenizer, a MiniLM): it flips, removes,
repeats and inserts bytes, truncates files, replaces them by folders, and changes
JSON values. Most damaged banks get new hashes, so that the code after the hash
check runs too. A public function then reads each, and must succeed or raise an
`InputError` of one line. Anything else is printed with its case number, which
`--only NUMBER` repeats, and gives exit status 1.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
import contextlib
import json
from pathlib import Path
import random
import shutil
import sys
import tempfile
from typing import Any

import jax
import numpy as np

from benchmarks import make_parser, track
from tokenlora_jax import (
  Bank,
  load_adapters,
  load_bank,
  load_base,
  load_tokenizer,
  random_adapters,
  save_adapter,
  save_bank,
)
from tokenlora_jax.bank.record import sha256
from tokenlora_jax.config import DataConfig, InputError
from tokenlora_jax.data.rows import load_rows
from tokenlora_jax.formats.locate import open_base
from tokenlora_jax.formats.minilm import load_minilm

Load = Callable[[Path], object]
_ROWS = [{"question": f"{i} + 1?", "answer": f"#### {i + 1}"} for i in range(4)]
_LLAMA = {
  "model_type": "llama",
  "vocab_size": 260,
  "hidden_size": 32,
  "intermediate_size": 32,
  "num_hidden_layers": 1,
  "num_attention_heads": 2,
  "num_key_value_heads": 2,
  "rms_norm_eps": 1e-5,
  "max_position_embeddings": 64,
  "tie_word_embeddings": True,
}
_MINILM = {
  "model_type": "bert",
  "vocab_size": 12,
  "hidden_size": 8,
  "intermediate_size": 16,
  "num_hidden_layers": 1,
  "num_attention_heads": 2,
  "max_position_embeddings": 32,
  "type_vocab_size": 2,
  "layer_norm_eps": 1e-12,
  "hidden_act": "gelu",
}
# What a value of JSON becomes.
_VALUES = (
  None, True, 0, -1, 1, 2**31, 2**70, 1e308, float("nan"), float("inf"), "", "x",
  "\x00", "\ud800", "../x", "none", [], {}, [[]], {"": 0}, [None], "9" * 5000,
)  # fmt: skip


def write_sound(root: Path) -> dict[str, Load]:
  """Writes the sound files, a folder a kind; returns what loads each kind.

  Args:
    root: where.
  """
  from safetensors.numpy import save_file

  base = load_base("random:tiny", "float32")
  adapters = random_adapters(base, 2, 4)
  table = np.ones((2, 64), np.float32)
  bank = Bank(adapters, "random:tiny", base.fingerprint, {"hidden": table})
  save_bank(root / "bank", bank)
  save_adapter(adapters, 0, root / "adapter")
  load_tokenizer("random:tiny").save_pretrained(root / "tokenizer")
  rng = np.random.default_rng(0)
  kinds = ("q", "k", "v", "o", "gate", "up", "down")
  tensors = {
    "model.embed_tokens.weight": rng.normal(size=(260, 32)),
    "model.norm.weight": np.ones(32),
    "model.layers.0.input_layernorm.weight": np.ones(32),
    "model.layers.0.post_attention_layernorm.weight": np.ones(32),
  }
  for kind in kinds:
    module = "self_attn" if kind in "qkvo" else "mlp"
    name = f"model.layers.0.{module}.{kind}_proj.weight"
    tensors[name] = rng.normal(size=(32, 32))
  (root / "base").mkdir()
  (root / "base" / "config.json").write_text(json.dumps(_LLAMA))
  tensors = {k: v.astype(np.float32) for k, v in tensors.items()}
  save_file(tensors, root / "base" / "model.safetensors")
  (root / "gguf").mkdir()
  _write_gguf(root / "gguf" / "model.gguf", tensors)
  (root / "rows" / "gsm8k").mkdir(parents=True)
  for split in ("train", "test"):
    lines = "".join(json.dumps(row) + "\n" for row in _ROWS)
    (root / "rows" / "gsm8k" / f"{split}.jsonl").write_text(lines)
  _write_minilm(root / "minilm")
  return {
    "base": _read_all,
    "base-load": lambda folder: load_base(str(folder), "float32"),
    "gguf": _read_all,
    "gguf-load": lambda folder: load_base(str(folder), "float32"),
    "gguf-tokenizer": lambda folder: load_tokenizer(folder),
    "adapter": lambda folder: load_adapters([folder]),
    "bank": lambda folder: load_bank(folder, base),
    "bank-sealed": lambda folder: load_bank(_sealed(folder), base),
    "minilm": lambda folder: load_minilm(str(folder)),
    "tokenizer": lambda folder: load_tokenizer(folder),
    "rows": _read_rows,
  }


def _write_gguf(path: Path, tensors: dict[str, np.ndarray]) -> None:
  import gguf

  writer = gguf.GGUFWriter(path, "llama")
  writer.add_embedding_length(32)
  writer.add_feed_forward_length(32)
  writer.add_block_count(1)
  writer.add_head_count(2)
  writer.add_context_length(64)
  writer.add_layer_norm_rms_eps(1e-5)
  tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁"]
  writer.add_tokenizer_model("llama")
  writer.add_token_list(tokens)
  writer.add_token_scores([0.0] * len(tokens))
  writer.add_token_types([2, 3, 3, *[6] * 256, 1])
  writer.add_bos_token_id(1)
  writer.add_eos_token_id(2)
  names = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm",
    "model.layers.0": "blk.0", "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm", "self_attn.o_proj": "attn_output",
    "self_attn.": "attn_", "mlp.": "ffn_", "_proj": "",
  }  # fmt: skip
  for name, tensor in tensors.items():
    for old, new in names.items():
      name = name.replace(old, new)
    writer.add_tensor(name, tensor)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()


def _write_minilm(folder: Path) -> None:
  from safetensors.numpy import save_file
  import tokenizers

  (folder / "1_Pooling").mkdir(parents=True)
  (folder / "config.json").write_text(json.dumps(_MINILM))
  pooling = json.dumps({"pooling_mode_mean_tokens": True})
  (folder / "1_Pooling" / "config.json").write_text(pooling)
  limit = json.dumps({"max_seq_length": 16})
  (folder / "sentence_bert_config.json").write_text(limit)
  words = ("[PAD]", "[CLS]", "[SEP]", "[UNK]", *"abcdefgh")
  model = tokenizers.models.WordPiece(
    {word: i for i, word in enumerate(words)}, unk_token="[UNK]"
  )
  tokenizer = tokenizers.Tokenizer(model)
  tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
    single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
  )
  tokenizer.save(str(folder / "tokenizer.json"))
  layer = "encoder.layer.0"
  tensors = {
    "embeddings.word_embeddings.weight": np.ones((12, 8)),
    "embeddings.position_embeddings.weight": np.ones((32, 8)),
    "embeddings.token_type_embeddings.weight": np.ones((2, 8)),
  }
  for name, width, out in (
    (f"{layer}.attention.self.query", 8, 8),
    (f"{layer}.attention.self.key", 8, 8),
    (f"{layer}.attention.self.value", 8, 8),
    (f"{layer}.attention.output.dense", 8, 8),
    (f"{layer}.intermediate.dense", 8, 16),
    (f"{layer}.output.dense", 16, 8),
  ):
    tensors[f"{name}.weight"] = np.ones((out, width))
    tensors[f"{name}.bias"] = np.zeros(out)
  for name in ("embeddings", f"{layer}.attention.output", f"{layer}.output"):
    tensors[f"{name}.LayerNorm.weight"] = np.ones(8)
    tensors[f"{name}.LayerNorm.bias"] = np.zeros(8)
  save_file(
    {name: x.astype(np.float32) for name, x in tensors.items()},
    folder / "model.safetensors",
  )


def _sealed(folder: Path) -> Path:
  """Writes the hashes of a bank's files, as they are now, into bank.json."""
  file = folder / "bank.json"
  # What was damaged may be no bank.json any more.
  with contextlib.suppress(
    OSError, ValueError, KeyError, TypeError, IndexError, AttributeError
  ):
    about = json.loads(file.read_text())
    about["centroids"]["sha256"] = sha256(folder / "centroids.safetensors")
    for expert in about["experts"]:
      for name in expert["sha256"]:
        expert["sha256"][name] = sha256(folder / expert["name"] / name)
    file.write_text(json.dumps(about))
  return folder


def _read_all(folder: Path) -> None:
  """Reads each number, and the fingerprints, without XLA's compiling."""
  reader = open_base(folder)
  reader.fingerprint(), reader.fingerprint_1()
  for name in reader.names:
    shape = reader.shape(name)
    out = np.empty(shape, np.float32)
    reader.fill(out, name, tuple(slice(0, n) for n in shape))


def _read_rows(folder: Path) -> None:
  config = DataConfig(source="local", dir=str(folder), tasks=("gsm8k",))
  load_rows(config, "gsm8k", "train")


# -----------------------------------------------------------------------------
# Damage.


def damage(folder: Path, rng: random.Random) -> str:
  """Damages one file of a folder, and returns how.

  Args:
    folder: with the files of one kind.
    rng: chooses.
  """
  files = sorted(p for p in folder.rglob("*") if p.is_file())
  if not files:
    return "nothing left"
  file = rng.choice(files)
  name = str(file.relative_to(folder))
  if rng.random() < 0.03:
    file.unlink()
    if rng.random() < 0.5:
      file.mkdir()
      return f"{name}: a folder"
    return f"{name}: gone"
  data = bytearray(file.read_bytes())
  act, texts = rng.random(), (".json", ".jsonl")
  # What was damaged before may be no JSON any more.
  with contextlib.suppress(ValueError, TypeError, IndexError):
    if act < 0.6 and file.suffix in (*texts, ".safetensors"):
      data, how = _other_json(data, file.suffix, rng)
      file.write_bytes(data)
      return f"{name}: {how}"
  data, how = _other_bytes(data, rng)
  file.write_bytes(data)
  return f"{name}: {how}"


def _other_json(
  data: bytes, suffix: str, rng: random.Random
) -> tuple[bytes, str]:
  """Changes one value in a JSON text, a line of JSON or a tensors' header."""
  if suffix == ".safetensors":
    size = int.from_bytes(data[:8], "little")
    value, how = _other_value(json.loads(data[8 : 8 + size]), rng)
    header = json.dumps(value).encode()
    return len(header).to_bytes(8, "little") + header + data[8 + size :], how
  lines = data.decode().split("\n") if suffix == ".jsonl" else [data.decode()]
  at = rng.randrange(max(1, len(lines) - 1))
  value, how = _other_value(json.loads(lines[at]), rng)
  lines[at] = json.dumps(value)
  return "\n".join(lines).encode(), how


def _other_value(value: Any, rng: random.Random) -> tuple[Any, str]:
  """Exchanges, drops or adds one value somewhere in JSON."""
  place, path = value, []
  while True:
    keys = [*place] if isinstance(place, dict) else [*range(len(place))]
    if not keys:
      return value, "nothing"
    key = rng.choice(keys)
    path.append(str(key)[:30])
    inner = place[key]
    if not (isinstance(inner, (dict, list)) and inner) or rng.random() < 0.2:
      break
    place = inner
  act = rng.randrange(4)
  if act == 0:
    del place[key]
  elif act == 1 and isinstance(place, dict):
    place[f"{key}x"] = place.pop(key)
  elif type(inner) in (int, float) and act == 2:
    place[key] = inner + rng.choice((-1, 1, 1000, -1000, 0.5))
  else:
    place[key] = rng.choice(_VALUES)
  return value, f"{'/'.join(path)} changed ({act})"


def _other_bytes(data: bytearray, rng: random.Random) -> tuple[bytes, str]:
  # The first bytes say what follows.
  end = max(1, rng.choice((16, 200, 4000, len(data))))
  at = min(rng.randrange(end), max(0, len(data) - 1))
  count = rng.choice((1, 2, 8, 100))
  act = rng.choice(("cut", "flip", "drop", "double", "noise", "empty"))
  piece = data[at : at + count]
  if act == "cut":
    data = data[:at]
  elif act == "flip":
    data[at : at + 1] = bytes(b ^ 1 << rng.randrange(8) for b in piece[:1])
  elif act == "drop":
    del data[at : at + count]
  elif act == "double":
    data[at:at] = piece
  elif act == "noise":
    data[at : at + count] = rng.randbytes(count)
  elif rng.random() < 0.2:
    data = b""
  return bytes(data), f"{act} at byte {at}, {count}"


# -----------------------------------------------------------------------------


def attempt(
  sound: Path, loads: dict[str, Load], seed: int, number: int
) -> tuple[str, str, str | None]:
  """Damages a kind of file and loads it.

  Args:
    sound: what `write_sound` wrote.
    loads: what it returned.
    seed: of all cases.
    number: of this one.

  Returns:
    The kind, `loaded` or `refused`, and what went wrong, or None.
  """
  rng = random.Random(f"{seed} {number}")
  kind = rng.choice(sorted(loads))
  source = sound / kind.partition("-")[0]
  with tempfile.TemporaryDirectory() as scratch:
    folder = shutil.copytree(source, Path(scratch, "x"))
    how = "; ".join(damage(folder, rng) for _ in range(rng.choice((1, 1, 2))))
    try:
      loads[kind](folder)
      return kind, "loaded", None
    except InputError as error:
      fine = "\n" not in str(error)
      return kind, "refused", None if fine else f"{how}: {error!r}"
    # The benchmark looks for exactly these: any error but InputError.
    except Exception as error:
      text = " ".join(f"{type(error).__name__}: {error}".split())[:300]
      return kind, "failed", f"{how}: {text}"


def main(argv: Sequence[str] | None = None) -> int:
  """Runs all cases, and prints what went wrong."""
  parser = make_parser("benchmarks.hostile", __doc__)
  parser.add_argument("--cases", type=int, default=10_000)
  parser.add_argument("--first", type=int, default=0, help="case to begin with")
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--only", type=int, default=-1, help="one case's number")
  args = parser.parse_args(argv)
  numbers = range(args.first, args.first + args.cases)
  numbers = [args.only] if args.only >= 0 else list(numbers)
  counts: Counter[tuple[str, str]] = Counter()
  bad = 0
  print(f"seed {args.seed}, {len(numbers)} cases")
  with tempfile.TemporaryDirectory() as scratch:
    loads = write_sound(Path(scratch))
    for number in track(numbers, "cases"):
      kind, end, wrong = attempt(Path(scratch), loads, args.seed, number)
      counts[kind, end] += 1
      if wrong is not None:
        bad += 1
        print(f"case {number} ({kind}): {wrong}")
      if number % 200 == 0:
        # Shapes differ from case to case.
        jax.clear_caches()
  for (kind, end), count in sorted(counts.items()):
    print(f"{kind} {end}: {count}")
  print(f"{bad} of {len(numbers)} ended in something other than one line")
  return int(bad > 0)


if __name__ == "__main__":
  sys.exit(main())
