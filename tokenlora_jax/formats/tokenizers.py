"""Loads the tokenizer of a base, from the base's path."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
import contextlib
import logging
from pathlib import Path
import threading
from typing import TYPE_CHECKING, Any

from tokenlora_jax.config import InputError, check_choice, nearest
from tokenlora_jax.formats.gguf import metadata, open_gguf
from tokenlora_jax.formats.hf import read_json
from tokenlora_jax.formats.locate import TOKENIZER_FILES, locate
from tokenlora_jax.formats.reader import one_line
from tokenlora_jax.formats.tensors import check_fetched
from tokenlora_jax.model.config import PRESETS

if TYPE_CHECKING:
  from tokenizers import Tokenizer
  from transformers import PreTrainedTokenizerFast

# Kinds of token, with the same numbers in GGUF and SentencePiece.
_NORMAL, _UNKNOWN, _CONTROL, _USER = 1, 2, 3, 4

# Regex that first splits text for byte-level vocabularies, by GGUF's
# tokenizer.ggml.pre; None is GPT-2's. "default" is missing: the file's writer
# did not know. SmolLM2 was trained with digits split off too, which matters only
# after two spaces or more; we split as transformers does for the same file.
_WORDS = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s"
  r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CUTS = {
  "gpt-2": None,
  "smollm": None,
  "llama-bpe": _WORDS % "{1,3}",
  "qwen2": _WORDS % "",
}

# `random:` bases have byte tokens: byte b is token b + 4.
_BYTE_SPECIALS = ("<pad>", "<bos>", "<eos>", "<unk>")


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerFast:
  """Loads the tokenizer of a base.

  Args:
    path: as for `load_base`: a Hugging Face folder, a .gguf file, a hub id,
      `package:NAME`, or `random:PRESET` (bytes, with BOS at the start).

  Returns:
    A fast tokenizer of transformers; its repository's own code is never run.

  Raises:
    InputError: the path has no tokenizer, or we cannot reproduce it exactly.

  Example:
    >>> tokenizer = load_tokenizer("random:tiny")
    >>> tokenizer.encode("hi")
    [1, 108, 109]
    >>> tokenizer.decode([108, 109])
    'hi'
  """
  text = str(path)
  if text.startswith("random:"):
    preset = text.removeprefix("random:")
    check_choice("base.path random:", preset, tuple(PRESETS))
    with _as_input_error(text):
      return _bytes_tokenizer()
  return read_tokenizer(locate(path, TOKENIZER_FILES))


def read_tokenizer(place: Path) -> PreTrainedTokenizerFast:
  """Reads the tokenizer that was found, as `load_tokenizer` does.

  Args:
    place: a folder or a .gguf file, from `locate`.

  Raises:
    InputError: there is no tokenizer, or we cannot reproduce it exactly.
  """
  with _as_input_error(str(place)):
    read = _from_gguf if place.is_file() else _from_folder
    tokenizer, ends = read(place)
    # Where `data.tokens.end_tokens` finds them.
    tokenizer.end_tokens = ends
    return tokenizer


@contextlib.contextmanager
def importing_beside() -> Iterator[None]:
  """Imports transformers in a thread while the block runs.

  The import takes most of a second, and reading weights leaves Python idle. The
  block must not load a tokenizer: a second import of transformers meanwhile
  would get a module that is not complete yet.
  """
  thread = threading.Thread(target=_import, daemon=True)
  thread.start()
  try:
    yield
  finally:
    thread.join()


def _import() -> None:
  # The next import raises the error again, where it can be reported.
  with contextlib.suppress(Exception):
    from transformers import PreTrainedTokenizerFast  # noqa: F401


@contextlib.contextmanager
def _as_input_error(where: str) -> Iterator[None]:
  """Silences the libraries' advice; turns their errors into `InputError`s."""
  before = logging.root.manager.disable
  logging.disable(logging.ERROR)
  try:
    yield
  except InputError:
    raise
  # The tokenizers library raises a bare Exception for files it cannot read.
  except Exception as error:
    raise InputError(
      f"{where}: its tokenizer cannot be read ({one_line(error)})"
    ) from error
  finally:
    logging.disable(before)


def _from_folder(
  folder: Path,
) -> tuple[PreTrainedTokenizerFast, tuple[int, ...]]:
  models = sorted(folder.glob("*.model"))
  names = ("tokenizer.json", "tokenizer_config.json", "vocab.json")
  for file in (*models, *(folder / name for name in names)):
    check_fetched(file)
  has = {name: (folder / name).is_file() for name in names}
  if has["tokenizer.json"]:
    tokenizer = _from_tokenizer_json(folder)
  elif not has["vocab.json"] and len(models) == 1:
    tokenizer = _from_sentencepiece(models[0])
  elif any(has.values()):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(
      folder, local_files_only=True, trust_remote_code=False
    )
  else:
    raise InputError(
      f"{folder}: has no tokenizer; want {', '.join(names)} or one .model file"
    )
  return tokenizer, _listed_ends(folder)


def _listed_ends(folder: Path) -> tuple[int, ...]:
  """Returns generation_config.json's end tokens, or else config.json's."""
  for name in ("generation_config.json", "config.json"):
    file = folder / name
    listed = _json(file).get("eos_token_id")
    if listed is None:
      continue
    ids = listed if isinstance(listed, list) else [listed]
    if any(type(i) is not int or i >= 2**31 for i in ids):
      raise InputError(
        f"{file}: eos_token_id {str(listed)[:40]!r} is not allowed; want a"
        " token's id, or a list of them"
      )
    # Some write -1 for none.
    return tuple(i for i in ids if i >= 0)
  return ()


def _json(file: Path) -> dict[str, Any]:
  """Returns a JSON file's object, or {} if there is no such file."""
  return read_json(file) if file.is_file() else {}


def _from_tokenizer_json(folder: Path) -> PreTrainedTokenizerFast:
  """Reads tokenizer.json alone; ignores the tokenizer class in other files.

  transformers' class would rebuild parts of it: Llama's drops the spaces at the
  start of a text.
  """
  from tokenizers import Tokenizer
  from transformers import PreTrainedTokenizerFast

  own = Tokenizer.from_file(str(folder / "tokenizer.json"))
  tokenizer = PreTrainedTokenizerFast.from_pretrained(
    folder, local_files_only=True, trust_remote_code=False
  )
  parts = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
  for part in parts:
    setattr(tokenizer.backend_tokenizer, part, getattr(own, part))
  return tokenizer


def _from_gguf(
  path: Path,
) -> tuple[PreTrainedTokenizerFast, tuple[int, ...]]:
  """Builds a tokenizer from metadata; transformers' own loader needs torch."""
  file = open_gguf(path)

  def get(name, default=None):
    return metadata(file, f"tokenizer.{name}", default)

  tokens = get("ggml.tokens", [])
  kinds = get("ggml.token_type", [_NORMAL] * len(tokens))
  if len(set(tokens)) != len(tokens) or len(kinds) != len(tokens):
    raise InputError(f"{path}: its tokens are not distinct, each of one kind")
  special = {
    name: _token(path, tokens, get(f"ggml.{key}_token_id"))
    for name, key in {
      "bos_token": "bos", "eos_token": "eos",
      "unk_token": "unknown", "pad_token": "padding",
    }.items()
  }  # fmt: skip
  model = get("ggml.model")
  if model == "gpt2":
    cut = get("ggml.pre")
    if cut in (None, "default"):
      raise InputError(
        f"{path}: does not say how its tokenizer cuts text (tokenizer.ggml.pre"
        f" is {cut or 'missing'}); convert the model anew with today's"
        " llama.cpp, or name its Hugging Face folder"
      )
    check_choice(f"{path}: tokenizer.ggml.pre", cut, tuple(_CUTS))
    merges = [tuple(m.split(" ")) for m in get("ggml.merges", [])]
    tokenizer = _byte_level(tokens, merges, cut)
    # llama.cpp's default if the file has no value.
    has_bos = cut == "llama-bpe"
  elif model == "llama":
    tokenizer = _sentencepiece(
      tokens,
      get("ggml.scores", []),
      kinds,
      get("ggml.add_space_prefix", True),
    )
    has_bos = True
  else:
    raise InputError(
      f"{path}: tokenizer.ggml.model {model!r} is not one of gpt2, llama"
      f"{nearest(str(model), ('gpt2', 'llama'))}"
    )
  if get("ggml.add_eos_token", False):
    raise InputError(f"{path}: tokenizer.ggml.add_eos_token: want false")
  _add_tokens(tokenizer, tokens, kinds)
  has_bos = get("ggml.add_bos_token", has_bos)
  ends = [get(f"ggml.{key}_token_id") for key in ("eos", "eot", "eom")]
  ends = tuple(i for i in ends if _token(path, tokens, i) is not None)
  return _wrap(tokenizer, special, has_bos, get("chat_template")), ends


def _token(path: Path, tokens: Sequence[str], index: int | None) -> str | None:
  if index is not None and not 0 <= index < len(tokens):
    raise InputError(f"{path}: token {index} is none of {len(tokens)}")
  return None if index is None else tokens[index]


def _from_sentencepiece(path: Path) -> PreTrainedTokenizerFast:
  try:
    import sentencepiece
  except ImportError as error:
    raise InputError(
      f"{path}: needs sentencepiece; pip install sentencepiece"
    ) from error
  model = sentencepiece.SentencePieceProcessor(model_file=str(path))
  ids = range(model.vocab_size())
  tokens = [model.id_to_piece(i) for i in ids]
  kinds = [
    _UNKNOWN if model.is_unknown(i)
    else _CONTROL if model.is_control(i)
    else _NORMAL
    for i in ids
  ]  # fmt: skip
  scores = [model.get_score(i) for i in ids]
  tokenizer = _sentencepiece(tokens, scores, kinds, add_space=True)
  # Algorithms and normal forms other than Llama's would give other tokens.
  probe = "\ufb01 \uff21  \xe9\t" + "".join(tokens).replace("▁", " ")
  if tokenizer.encode(probe).ids != model.encode(probe):
    raise InputError(f"{path}: want BPE without normal forms, as in Llama")
  _add_tokens(tokenizer, tokens, kinds)
  places = {
    "bos_token": model.bos_id(), "eos_token": model.eos_id(),
    "unk_token": model.unk_id(), "pad_token": model.pad_id(),
  }  # fmt: skip
  special = {k: tokens[i] if i >= 0 else None for k, i in places.items()}
  config = _json(path.parent / "tokenizer_config.json")
  _add_listed(tokenizer, path.parent, config)
  for name in special:
    token = config.get(name)
    token = token.get("content") if isinstance(token, dict) else token
    # Old files have "" where the model's default counts.
    if token and tokenizer.token_to_id(token) is not None:
      special[name] = token
  has_bos = special["bos_token"] is not None
  template = config.get("chat_template")
  file = path.parent / "chat_template.jinja"
  if file.is_file():
    template = file.read_text("utf-8")
  return _wrap(
    tokenizer, special, has_bos and config.get("add_bos_token", True), template
  )


def _add_listed(
  tokenizer: Tokenizer, folder: Path, config: Mapping[str, Any]
) -> None:
  """Adds the tokens that follow those of a SentencePiece model."""
  listed = {
    i: {"content": token, "special": False}
    for token, i in _json(folder / "added_tokens.json").items()
  }
  decoder = config.get("added_tokens_decoder") or {}
  listed |= {int(i): token for i, token in decoder.items()}
  tokens, kinds = [], []
  for i in sorted(i for i in listed if i >= tokenizer.get_vocab_size()):
    if i != tokenizer.get_vocab_size() + len(tokens):
      raise InputError(f"{folder}: added token {i} leaves a gap before it")
    tokens.append(listed[i]["content"])
    kinds.append(_CONTROL if listed[i].get("special") else _USER)
  _add_tokens(tokenizer, tokens, kinds)


def _byte_level(
  tokens: Sequence[str], merges: Sequence[tuple[str, ...]], cut: str
) -> Tokenizer:
  """Returns a tokenizer like GPT-2's: regex split, bytes merged by rank."""
  from tokenizers import (
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
  )

  vocab = {token: i for i, token in enumerate(tokens)}
  # Llama-3 looks a whole word up in the vocabulary before it merges bytes.
  whole = cut == "llama-bpe"
  tokenizer = Tokenizer(
    models.BPE(vocab=vocab, merges=merges, ignore_merges=whole)
  )
  if cut == "qwen2":
    tokenizer.normalizer = normalizers.NFC()
  regex = _CUTS[cut]
  to_bytes = pre_tokenizers.ByteLevel(
    add_prefix_space=False, use_regex=regex is None
  )
  tokenizer.pre_tokenizer = to_bytes
  if regex is not None:
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
      [pre_tokenizers.Split(Regex(regex), "isolated"), to_bytes]
    )
  tokenizer.decoder = decoders.ByteLevel()
  return tokenizer


def _sentencepiece(
  tokens: Sequence[str],
  scores: Sequence[float],
  kinds: Sequence[int],
  add_space: bool,
) -> Tokenizer:
  """Returns a tokenizer like Llama's: merges characters by highest score."""
  from tokenizers import Tokenizer, decoders, models, normalizers

  vocab = {token: i for i, token in enumerate(tokens)}
  normal = {
    token: score
    for token, score, kind in zip(tokens, scores, kinds, strict=True)
    if kind == _NORMAL
  }
  # Sorting is stable: splits of equal score keep the vocabulary's order.
  merges = [
    (token[:i], token[i:])
    for token in sorted(normal, key=normal.get, reverse=True)
    for i in range(1, len(token))
    if token[:i] in normal and token[i:] in normal
  ]
  unknown = [
    t for t, kind in zip(tokens, kinds, strict=True) if kind == _UNKNOWN
  ]
  tokenizer = Tokenizer(
    models.BPE(
      vocab=vocab, merges=merges, byte_fallback=True, fuse_unk=True,
      unk_token=unknown[0] if unknown else None,
    )
  )  # fmt: skip
  steps = [normalizers.Replace(" ", "▁")]
  undo = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
  if add_space:
    steps.insert(0, normalizers.Prepend("▁"))
    undo.append(decoders.Strip(" ", left=1))
  tokenizer.normalizer = normalizers.Sequence(steps)
  tokenizer.decoder = decoders.Sequence(undo)
  return tokenizer


def _bytes_tokenizer() -> PreTrainedTokenizerFast:
  """Returns a tokenizer of 256 bytes and four special tokens, no merges."""
  plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
  # Byte-level tokenizers write bytes as themselves, or from code 256 upwards.
  hidden = [byte for byte in range(256) if byte not in plain]
  letters = {byte: chr(byte) for byte in plain}
  letters |= {byte: chr(256 + i) for i, byte in enumerate(hidden)}
  tokens = [*_BYTE_SPECIALS, *(letters[byte] for byte in range(256))]
  tokenizer = _byte_level(tokens, [], "gpt-2")
  _add_tokens(tokenizer, tokens, [_CONTROL] * 4 + [_NORMAL] * 256)
  names = ("pad_token", "bos_token", "eos_token", "unk_token")
  special = dict(zip(names, _BYTE_SPECIALS, strict=True))
  return _wrap(tokenizer, special, has_bos=True)


def _add_tokens(
  tokenizer: Tokenizer, tokens: Sequence[str], kinds: Sequence[int]
) -> None:
  """Adds control and user-defined tokens, which match as a whole in text."""
  from tokenizers import AddedToken

  for token, kind in zip(tokens, kinds, strict=True):
    if kind in (_UNKNOWN, _CONTROL):
      tokenizer.add_special_tokens([AddedToken(token, normalized=False)])
    elif kind == _USER:
      tokenizer.add_tokens([AddedToken(token, normalized=False)])


def _wrap(
  tokenizer: Tokenizer,
  special: Mapping[str, str | None],
  has_bos: bool,
  chat_template: Any = None,
) -> PreTrainedTokenizerFast:
  from tokenizers import processors
  from transformers import PreTrainedTokenizerFast

  if has_bos:
    bos = special["bos_token"]
    tokenizer.post_processor = processors.TemplateProcessing(
      single=f"{bos} $A",
      pair=f"{bos} $A {bos} $B",
      special_tokens=[(bos, tokenizer.token_to_id(bos))],
    )
  return PreTrainedTokenizerFast(
    tokenizer_object=tokenizer,
    clean_up_tokenization_spaces=False,
    chat_template=chat_template,
    **{name: token for name, token in special.items() if token is not None},
  )
