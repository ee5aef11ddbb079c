"""The picture of a heat map, read back pixel by pixel and word by word."""

import ast
import io
from pathlib import Path
import re

from maps import EXPERTS, HOSTILE, random_gates, some_map
from matplotlib.axes import Axes
import matplotlib.image
import numpy as np
import pytest

from tokenlora_jax import report
from tokenlora_jax.report import COLOURS, HeatMap, colours, picture

ROOT = Path(__file__).parents[1]


@pytest.fixture
def words(monkeypatch):
  """What is written in the pictures that a test draws."""
  words = []
  text = Axes.text

  def writes(self, x, y, word, **settings):
    words.append(word)
    return text(self, x, y, word, **settings)

  monkeypatch.setattr(Axes, "text", writes)
  return words


def pixels(data):
  image = matplotlib.image.imread(io.BytesIO(data), format="png")
  return np.round(255 * image[..., :3]).astype(int)


def count(image, colour):
  return int((image == colours.channels(colour)).all(axis=-1).sum())


def test_picture_has_the_experts_colours_in_their_shares(words):
  gates = np.tile([0.5, 0.3, 0.2], (10, 1))
  image = pixels(report.heatmap_png([some_map(gates=gates)]))
  height, width, _ = image.shape
  assert width == picture.PIXELS * picture.WIDTH
  assert 300 < height < 900
  found = np.array([count(image, colour) for colour in COLOURS])
  area = picture.PIXELS**2 * picture.AREA * (picture.WIDTH - 68)
  np.testing.assert_allclose(found[:3] / area, gates[0], atol=0.03)
  assert not found[3:].any()
  # Text of the first expert alone.
  tint = colours.mix(COLOURS[0], picture.PAPER, colours.tint(0.2))
  assert count(image, tint) > 1000
  assert "Question: <b>?" in [word.strip() for word in words]
  assert "   In May 1 < 2 & 3↵" in words
  assert [name for name in EXPERTS if name in words] == EXPERTS
  assert "router centroid" in " ".join(words)


def test_long_texts_are_cut_with_a_note(words, monkeypatch):
  pieces = [f" word{i}" for i in range(3000)]
  gates = np.repeat(random_gates(60, 3), 50, axis=0)
  long = some_map(prompt="one line\n" * 50, pieces=pieces, gates=gates)
  image = pixels(report.heatmap_png([long]))
  assert image.shape[0] < 2600
  shown = re.findall(r"\bword(\d+)\b", " ".join(words))
  assert shown == list(map(str, range(len(shown))))
  assert 400 < len(shown) < 1000
  assert f"... {3000 - len(shown):,} more tokens" in words
  assert "... 42 more lines of the prompt" in words
  words.clear()
  monkeypatch.setattr(picture, "SECTIONS", 2)
  report.heatmap_png([some_map()] * 5)
  assert words.count("codealpaca") == 2
  assert "... 3 more prompts" in words


def test_picture_shows_any_text(words):
  """No warning of a missing letter, no mathematics, no lost token."""
  pieces = [
    *HOSTILE,
    "$x^2$",
    "駅",
    "مر",
    "e",
    "\u0301",
    "\u200b",
    "👩\u200d🚀",
  ]
  gates = random_gates(len(pieces), 2)
  report.heatmap_png([HeatMap("$\\frac$", pieces, gates, ["$a$", "駅" * 40])])
  written = "".join(words)
  assert "$x^2$" in written and "$\\frac$" in written
  assert "$a$" in words and "□" * 17 + "…" in words


def test_lines_are_cut_after_words():
  def lines(text):
    cells = [
      picture.Cell(x, 0, ends={" ": "word", "\n": "line"}.get(x, ""))
      for x in text
    ]
    return [
      "".join(cell.text for cell in line) for line in picture.set_lines(cells)
    ]

  columns = picture.COLUMNS
  assert lines("") == []
  assert lines("a\n\nb") == ["a\n", "\n", "b"]
  long = "x" * (columns + 5)
  assert lines(long) == [long[:columns], long[columns:]]
  text = ("word " * columns)[: 4 * columns]
  found = lines(text)
  assert "".join(found) == text
  assert all(len(line) <= columns for line in found)
  assert all(line.endswith(" ") for line in found[:-1])


def test_matplotlib_loads_only_for_a_picture():
  for file in [ROOT / "infer.py", *(ROOT / "tokenlora_jax").rglob("*.py")]:
    for node in ast.parse(file.read_text()).body:
      names = [alias.name for alias in getattr(node, "names", [])]
      names.append(getattr(node, "module", None) or "")
      assert not any(name.startswith("matplotlib") for name in names), file
