"""Heat maps as a PNG picture, for use without a browser.

Text is set in cells of one width, so that tints and letters align. The picture
looks the same everywhere, since its fonts come with matplotlib.

Axis letters: N tokens, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
import io
import itertools
from pathlib import Path
import textwrap
from typing import TYPE_CHECKING, NamedTuple
import unicodedata

import numpy as np

from tokenlora_jax.report import colours, heatmap
from tokenlora_jax.report.heatmap import HeatMap

if TYPE_CHECKING:
  from matplotlib.axes import Axes

# In points: page width, margin, cell width, line height, font size, height of
# the stacked area.
WIDTH, MARGIN, CELL, LINE, FONT, AREA = 760, 28, 6, 17, 10, 84
PIXELS = 2  # Per point.
COLUMNS = (WIDTH - 2 * MARGIN) // CELL

# The most that is drawn; a note counts the rest.
PROMPT_LINES, TEXT_LINES, SECTIONS = 8, 48, 12

PAPER, INK, SOFT = "#ffffff", "#16181d", "#565c66"


class Cell(NamedTuple):
  """A cell of a line of text.

  Attributes:
    text: a character and its accents, or an expert's letter.
    token: index of its token; -1 is the prompt.
    width: width in columns.
    ends: "word" or "line" if one ends here.
    badge: whether it is an expert's letter.
  """

  text: str
  token: int
  width: int = 1
  ends: str = ""
  badge: bool = False


def heatmap_png(maps: Sequence[HeatMap]) -> bytes:
  """Returns a PNG picture with the heat maps of texts.

  Each token is tinted by the expert that leads it, over a stacked area of the
  gates. A note counts the lines and prompts that do not fit.

  Args:
    maps: heat maps, one section of the picture each.

  Example:
    >>> heatmap_png([HeatMap("1", ["2"], np.eye(1), ["sums"])])[1:4]
    b'PNG'
  """
  # Imported here: it takes seconds, and other commands do not need it.
  import matplotlib
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  with matplotlib.rc_context():
    matplotlib.rcdefaults()
    drawing = _Drawing(Path(matplotlib.get_data_path()) / "fonts" / "ttf")
    drawing.heading("Which expert leads each token", 15)
    drawing.note(heatmap.LEGEND)
    for i, one in enumerate(maps[:SECTIONS]):
      drawing.section(one, f"Prompt {i + 1} of {len(maps)}", len(maps) > 1)
    if len(maps) > SECTIONS:
      drawing.note(f"... {len(maps) - SECTIONS:,} more prompts")
    height = drawing.y + MARGIN
    # Two dots a point.
    figure = Figure((WIDTH / 72, height / 72), dpi=72 * PIXELS, facecolor=PAPER)
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, WIDTH), ylim=(height, 0))
    axes.set_axis_off()
    drawing.put_on(axes)
    file = io.BytesIO()
    figure.savefig(file, format="png", metadata={"Software": None})
  return file.getvalue()


def set_lines(cells: Sequence[Cell]) -> list[list[Cell]]:
  """Breaks cells into lines of at most COLUMNS, after words if possible.

  Args:
    cells: the cells of one text, in order.

  Example:
    >>> cells = [Cell("a", 0), Cell("↵", 0, ends="line"), Cell("b", 0)]
    >>> [len(line) for line in set_lines(cells)]
    [2, 1]
  """
  lines, line, width = [], [], 0
  for cell in cells:
    if width + cell.width > COLUMNS:
      ends = [i + 1 for i, other in enumerate(line) if other.ends]
      cut = ends[-1] if ends else len(line)
      lines.append(line[:cut])
      line = line[cut:]
      width = sum(other.width for other in line)
    line.append(cell)
    width += cell.width
    if cell.ends == "line":
      lines.append(line)
      line, width = [], 0
  return [*lines, line] if line else lines


class _Drawing:
  """The parts of a picture, from the top down; they decide its height."""

  def __init__(self, fonts: Path):
    from matplotlib.font_manager import FontProperties, get_font

    files = {
      "mono": fonts / "DejaVuSansMono.ttf",
      "sans": fonts / "DejaVuSans.ttf",
      "bold": fonts / "DejaVuSans-Bold.ttf",
    }
    self._fonts = {n: FontProperties(fname=f) for n, f in files.items()}
    self._known = set.intersection(
      *(set(get_font(file).get_charmap()) for file in files.values())
    )
    self._boxes: list[tuple[Sequence, str]] = []
    self._edges: list[np.ndarray] = []
    self._words: list[tuple] = []
    self.y = float(MARGIN)

  def put_on(self, axes: Axes) -> None:
    """Draws all parts."""
    from matplotlib.collections import LineCollection, PolyCollection

    axes.add_collection(
      PolyCollection(
        [corners for corners, _ in self._boxes],
        facecolors=[colour for _, colour in self._boxes],
        antialiaseds=False, linewidths=0,
      )
    )  # fmt: skip
    axes.add_collection(
      LineCollection(self._edges, colors=PAPER, linewidths=0.7)
    )
    for x, y, text, font, size, colour, middle in self._words:
      axes.text(
        x, y, text, font=self._fonts[font], fontsize=size, color=colour,
        ha="center" if middle else "left", parse_math=False,
        va="center_baseline" if middle else "baseline",
      )  # fmt: skip

  def _box(
    self, x: float, y: float, width: float, height: float, colour: str
  ) -> None:
    right, bottom = x + width, y + height
    corners = ((x, y), (right, y), (right, bottom), (x, bottom))
    self._boxes.append((corners, colour))

  def _word(
    self,
    x: float,
    y: float,
    text: str,
    font: str = "sans",
    size: float = 9,
    colour: str = INK,
    middle: bool = False,
  ) -> None:
    self._words.append((x, y, self._drawn(text), font, size, colour, middle))

  def _drawn(self, text: str) -> str:
    """Returns a text with a box for each character that the font lacks."""
    text = heatmap.visible(text).replace("\n", " ").replace("\t", " ")
    return "".join(x if ord(x) in self._known else "□" for x in text)

  def heading(self, text: str, size: int) -> None:
    """Adds a title."""
    self.y += 1.3 * size
    self._word(MARGIN, self.y, text, "bold", size)

  def note(self, text: str) -> None:
    """Adds small text of one line or more."""
    for line in textwrap.wrap(text, 144) or [""]:
      self.y += 14
      self._word(MARGIN, self.y, line, size=9, colour=SOFT)

  def section(self, one: HeatMap, title: str, titled: bool) -> None:
    """Adds a text, its gates and the legend of experts."""
    self.y += 12
    if titled:
      self.heading(title, 11)
    for line in one.about():
      self.note(line)
    self.y += 8
    self._text(one)
    self.y += 14
    self._area(one)
    self._legend(one)

  def _text(self, one: HeatMap) -> None:
    lines = set_lines(list(self._cells(one)))
    # Number of lines that hold the prompt alone.
    begins = next(
      (i for i, line in enumerate(lines) if line[-1].token >= 0), len(lines)
    )
    first = max(0, begins - PROMPT_LINES)
    if first:
      self.note(f"... {first:,} more lines of the prompt")
    last = begins + TEXT_LINES
    for line in lines[first:last]:
      self._line(line, one)
    if lines[last:]:
      left = len(one.pieces) - lines[last][0].token
      self.note(f"... {left:,} more tokens")

  def _cells(self, one: HeatMap) -> Iterator[Cell]:
    yield from self._of(one.prompt, -1, "")
    for i, piece in enumerate(one.pieces):
      cells = self._of(piece, i, heatmap.kind(piece))
      if one.starts[i] and one.leads[i] >= 0:
        name = heatmap.letter(int(one.leads[i]))
        badge = Cell(name, i, width=len(name) + 1, badge=True)
        cells.insert(heatmap.indent(piece), badge)
      yield from cells

  def _of(self, text: str, token: int, kind: str) -> list[Cell]:
    if kind in ("empty", "joined"):
      return [Cell("∅" if kind == "empty" else "◌", token)]
    marks = []
    for x in heatmap.visible(text):
      if x == "\n":
        marks.append(Cell("↵" if token >= 0 else " ", token, ends="line"))
      elif x == "\t":
        marks += [Cell(y, token, ends="word") for y in "→   "]
      elif x.isspace():
        marks.append(Cell("·" if kind else " ", token, ends="word"))
      elif unicodedata.category(x) in ("Mn", "Me", "Cf"):
        # An accent belongs to the character before.
        if marks and ord(x) in self._known:
          marks[-1] = marks[-1]._replace(text=marks[-1].text + x)
      else:
        marks.append(Cell(x if ord(x) in self._known else "□", token))
    return marks

  def _line(self, line: Sequence[Cell], one: HeatMap) -> None:
    self.y += LINE
    places = np.cumsum([MARGIN, *(CELL * cell.width for cell in line)])
    for x, cell in zip(places, line, strict=False):
      if cell.token < 0 or (lead := int(one.leads[cell.token])) < 0:
        continue
      colour, width = colours.colour(lead), CELL * cell.width
      opacity = colours.tint(one.strengths[cell.token])
      tint = colours.mix(colour, PAPER, opacity)
      self._box(x, self.y - 11, width, 14, tint)
      self._box(x, self.y + 3, width, 1.5, colour)
      if cell.badge:
        self._badge(x + width / 2, self.y - 4, cell.text, lead, width - 2, 10)
    # Draws as few words as possible, since each takes time. But text written
    # from right to left stays in its own token's place.
    turned = any(
      unicodedata.bidirectional(x) in ("R", "AL")
      for cell in line
      for x in cell.text
    )
    groups = itertools.groupby(
      zip(places, line, strict=False),
      lambda pair: pair[1].token if turned else pair[1].token >= 0,
    )
    for _, group in groups:
      start, cells = zip(*group, strict=True)
      text = "".join(
        " " * cell.width if cell.badge else cell.text for cell in cells
      )
      if text.strip():
        ink = INK if cells[0].token >= 0 else SOFT
        self._word(start[0], self.y, text, "mono", FONT, ink)

  def _badge(
    self,
    x: float,
    y: float,
    text: str,
    expert: int,
    width: float,
    height: float,
  ) -> None:
    """Adds an expert's letter in its colour, centred at (x, y)."""
    colour = colours.colour(expert)
    self._box(x - width / 2, y - height / 2, width, height, colour)
    ink = colours.ink(colour)
    self._word(x, y, text, "bold", 0.75 * height, ink, middle=True)

  def _area(self, one: HeatMap) -> None:
    """Adds the stacked area of all N tokens, even if the text is cut."""
    left, width = MARGIN + 12, WIDTH - 2 * MARGIN - 12
    count, bottom = len(one.pieces), self.y + AREA
    edges = np.repeat(left + width * np.arange(count + 1) / count, 2)[1:-1]
    # Each expert's part reaches the bottom, behind the parts below it.
    for expert in reversed(range(len(one.experts))):
      line = bottom - AREA * one.heights[:, expert] / one.top
      upper = np.stack([edges, np.repeat(line, 2)], axis=1)
      corners = [(left, bottom), *upper, (left + width, bottom)]
      self._boxes.append((corners, colours.colour(expert)))
      if one.edged:
        self._edges.append(upper)
    for expert, (x, y) in one.letter_places(14 / AREA).items():
      name = heatmap.letter(expert)
      x, y = left + width * x, bottom - AREA * y
      self._badge(x, y, name, expert, 8 * len(name), 11)
    for tick in heatmap.ticks(count):
      x = left + width * (tick - 0.5) / count
      self._word(x, bottom + 8, str(tick), size=7.5, colour=SOFT, middle=True)
    for y, text in ((self.y + 3, f"{one.top:g}"), (bottom - 3, "0")):
      self._word(MARGIN + 4, y, text, size=7.5, colour=SOFT, middle=True)
    self.y = bottom + 16

  def _legend(self, one: HeatMap) -> None:
    """Adds each expert's letter, name and mean gate, four in a row."""
    width = (WIDTH - 2 * MARGIN) / 4
    for expert, label in enumerate(one.experts):
      self.y += 18 * (expert % 4 == 0)
      x, name = MARGIN + width * (expert % 4), heatmap.letter(expert)
      badge = 6 + 7 * len(name)
      self._badge(x + badge / 2, self.y - 3, name, expert, badge, 13)
      self._word(x + badge + 5, self.y, heatmap.short(label, 18))
      mean = f"{one.gates[:, expert].mean():.2f}"
      self._word(x + width - 34, self.y, mean, colour=SOFT)
    self.y += 6
