"""Heat maps as one HTML page, which needs no network and no server.

Texts and names are untrusted: they are escaped, or put into JSON without "<",
and the page's content security policy allows only its own script. The page is
complete without the script, which adds the pointer and the keyboard.

Axis letters: N tokens, E experts.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
import hashlib
from html import escape
from importlib import resources
import json
import re

import numpy as np

from tokenlora_jax.report import colours, heatmap
from tokenlora_jax.report.colours import COLOURS
from tokenlora_jax.report.heatmap import HeatMap

# Number of tints, and height of the stacked area in pixels, without its axis.
STEPS = 9
AREA = 112

_SPOKEN = {"\n": "new line", "\r": "return", "\t": "tab"}


def heatmap_html(maps: Sequence[HeatMap]) -> str:
  """Returns an HTML page with the heat maps of texts.

  Each token is tinted by the expert that leads it; a stacked area of the gates
  is linked with the text, by pointer and by keyboard.

  Args:
    maps: heat maps, one section of the page each.

  Example:
    >>> page = heatmap_html([HeatMap("1", ["<2>"], np.eye(1), ["sums"])])
    >>> "<2>" in page, "&lt;2&gt;" in page
    (False, True)
  """
  page = resources.files(__package__).joinpath("page.html").read_text("utf-8")
  page = page.replace("@experts@", _styles())
  own = dict(re.findall(r"<(style|script)>(.*?)</\1>", page, re.DOTALL))
  sections = [_section(i, one, len(maps)) for i, one in enumerate(maps)]
  parts = {
    "style": _digest(own["style"]),
    "script": _digest(own["script"]),
    "legend": heatmap.LEGEND,
    "sections": "\n".join(sections),
    "data": _data(maps),
  }
  return re.sub(r"@(\w+)@", lambda found: parts[found[1]], page)


def _digest(text: str) -> str:
  """Returns the hash by which a content security policy allows a text."""
  digest = hashlib.sha256(text.encode()).digest()
  return f"'sha256-{base64.b64encode(digest).decode()}'"


def _styles() -> str:
  """Returns the CSS rules of the experts' colours and of the tints."""
  rules = []
  for i, colour in enumerate(COLOURS):
    red, green, blue = colours.channels(colour)
    rules.append(
      f".e{i} {{ --c: {red} {green} {blue}; --on: {colours.ink(colour)} }}"
    )
  for step in range(1, STEPS + 1):
    rules.append(f".s{step} {{ --a: {colours.tint(step / STEPS):.3f} }}")
  return "\n".join(rules)


def _data(maps: Sequence[HeatMap]) -> str:
  """Returns the maps as JSON without characters that end an HTML script."""
  records = [
    {
      "prompt": one.prompt,
      "pieces": list(one.pieces),
      "gates": np.round(one.gates.astype(float), 4).tolist(),
      "experts": list(one.experts),
      "facts": {label: str(value) for label, value in one.facts.items()},
    }
    for one in maps
  ]
  text = json.dumps(records, separators=(",", ":"))
  for sign in "<>&":
    text = text.replace(sign, f"\\u{ord(sign):04x}")
  return text


def _text(text: str) -> str:
  """Returns untrusted text as HTML."""
  return escape(heatmap.visible(text))


def _section(at: int, one: HeatMap, count: int) -> str:
  facts, summary = map(_text, one.about())
  title = f"Prompt {at + 1} of {count}" if count > 1 else "The text"
  tokens = "".join(_token(one, i) for i in range(len(one.pieces)))
  experts = "\n".join(_expert(one, i) for i in range(len(one.experts)))
  return f"""\
<section aria-labelledby="title-{at}">
<h2 id="title-{at}">{title}</h2>
<p class="facts">{facts}</p>
<p class="facts">{summary}</p>
<div class="text" dir="auto"><span class="prompt">{_text(one.prompt)}</span>\
<span class="tokens" role="listbox" aria-orientation="horizontal"\
 aria-label="Tokens of the text">{tokens}</span></div>
<div class="panel">
<p class="now"><span>Mean gates of all tokens</span><code></code></p>
<div class="plot" data-top="{one.top:g}">{_area(one)}\
<div class="mark" hidden></div></div>
<ul class="experts">
{experts}
</ul>
</div>
<p class="unseen" role="status"></p>
</section>"""


def _token(one: HeatMap, i: int) -> str:
  """Returns a token's HTML; its text is the token's text, made visible."""
  piece, lead = one.pieces[i], int(one.leads[i])
  kind = heatmap.kind(piece)
  kinds, badge, name = [kind] if kind else [], "", ""
  if lead >= 0:
    step = max(1, int(np.ceil(one.strengths[i] * STEPS)))
    kinds += [f"e{lead % len(COLOURS)}", f"s{step}"]
    if one.starts[i]:
      badge = f'<i data-lead="{heatmap.letter(lead)}"></i>'
  if kind == "blank":
    name = f' aria-label="{_spoken(piece)}"'
  if kind == "empty":
    name = ' aria-label="no visible text"'
  at = heatmap.indent(piece)
  # A line feed is shown by a sign; copying the text still copies the feed.
  text = _text(piece[at:]).replace("\n", '<i class="nl"></i>\n')
  return (
    f'<span role="option" tabindex="{-1 if i else 0}" aria-selected="false"'
    f' class="{" ".join(kinds)}"{name}>{piece[:at]}{badge}{text}</span>'
  )


def _spoken(blank: str) -> str:
  """Returns white space in words.

  Example:
    >>> _spoken("\\n    ")
    'new line, 4 spaces'
  """
  runs = [found[0] for found in re.finditer(r"(.)\1*", blank, re.DOTALL)]
  words = [
    _SPOKEN.get(run[0], "space")
    if len(run) == 1
    else f"{len(run)} {_SPOKEN.get(run[0], 'space')}s"
    for run in runs
  ]
  return ", ".join(words)


def _area(one: HeatMap) -> str:
  """Returns the stacked area: one step per token, experts from the bottom."""
  count, top = len(one.pieces), one.top
  paths = []
  # Each expert's part is drawn down to the bottom, behind the parts below it,
  # so that no line of background shows between two parts.
  for expert in reversed(range(len(one.experts))):
    line = top - one.heights[:, expert]
    changes = np.flatnonzero(np.diff(line)) + 1
    steps = "".join(f"H{x}V{line[x]:.4g}" for x in changes)
    paths.append(
      f'<path class="e{expert % len(COLOURS)}"'
      f' d="M0 {top:.4g}V{line[0]:.4g}{steps}H{count}V{top:.4g}z"/>'
    )
  letters = [
    f'<text class="e{expert % len(COLOURS)}" x="{x:.2%}"'
    f' y="{(1 - y) * AREA:.1f}">{heatmap.letter(expert)}</text>'
    for expert, (x, y) in one.letter_places(16 / AREA).items()
  ]
  numbers = [
    f'<text class="tick" x="{(tick - 0.5) / count:.2%}" y="{AREA + 10}">'
    f"{tick}</text>"
    for tick in heatmap.ticks(count)
  ]
  edged = ' class="edged"' if one.edged else ""
  return (
    f'<svg height="{AREA + 20}" role="img" aria-label="Gates of each token,'
    f' stacked; the full height is {top:g}"><svg{edged}'
    f' viewBox="0 0 {count} {top:.4g}" preserveAspectRatio="none"'
    f' width="100%" height="{AREA}">{"".join(paths)}'
    f"</svg>{''.join(letters)}{''.join(numbers)}</svg>"
  )


def _expert(one: HeatMap, i: int) -> str:
  """Returns a row of the legend, with the mean of the expert's gates."""
  mean = float(one.gates[:, i].mean())
  return (
    f'<li class="e{i % len(COLOURS)}"><b>{heatmap.letter(i)}</b>'
    f'<span class="name">{_text(one.experts[i])}</span>'
    f'<span class="gate">{mean:.2f}</span>'
    f'<svg class="bar" aria-hidden="true"><rect height="100%"'
    f' width="{np.clip(mean / one.top, 0, 1):.1%}"/></svg></li>'
  )
