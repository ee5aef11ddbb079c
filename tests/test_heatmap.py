"""Heat maps, read back as a browser and a picture's viewer read them."""

import base64
import hashlib
from html.parser import HTMLParser
import itertools
import json
from pathlib import Path
import re
import tomllib

from maps import EXPERTS, HOSTILE, random_gates, some_map
import numpy as np
import pytest

from tokenlora_jax import report
from tokenlora_jax.report import COLOURS, HeatMap, colours, heatmap, picture

ROOT = Path(__file__).parents[1]
# -----------------------------------------------------------------------------
# What a map says.


def test_leaders_are_those_ahead():
  gates = np.array([[0.5, 0.5, 0], [0.6, 0.3, 0.1], [0, 1, 0], [0, 0.9, 0.1]])
  found = some_map(pieces=list("abcd"), gates=gates)
  # Of equals the first leads, as faintly as can be.
  assert found.leads.tolist() == [0, 0, 1, 1]
  np.testing.assert_allclose(found.strengths, [0, 0.3, 1, 0.8])
  assert found.starts.tolist() == [True, False, True, False]
  assert found.top == 1
  one = HeatMap("p", ["a"], np.array([[0.25]]), ["only"])
  assert (one.leads.tolist(), one.strengths.tolist()) == ([0], [0.25])
  # The routers "sum" and "base".
  assert some_map(pieces=["a"], gates=np.ones((1, 3))).top == 3
  assert some_map(pieces=["a"], gates=np.zeros((1, 3))).leads.tolist() == [-1]


@pytest.mark.parametrize(
  ("gates", "told"),
  [
    (np.ones((2, 2)), r"gates: \(2, 2\) is not allowed; want 1 tokens by 2"),
    (np.ones(2), "want 1 tokens by 2 experts"),
    (np.array([[1, np.nan]]), "not all of them are finite"),
  ],
)
def test_gates_that_do_not_fit_are_refused(gates, told):
  with pytest.raises(ValueError, match=told):
    HeatMap("p", ["a"], gates, ["x", "y"])
  with pytest.raises(ValueError, match="at least one of each"):
    HeatMap("p", [], np.ones((0, 2)), ["x", "y"])


def test_summary_agrees_with_sums_by_hand():
  gates = random_gates(30, 4) * np.random.default_rng(1).random((30, 1))
  gates[3], gates[4] = 0, [-1, 2, 0, 0]
  entropy, shares, leads = 0.0, np.zeros(4), []
  for row in gates:
    total = sum(abs(gate) for gate in row)
    if total:
      leads.append(max(range(4), key=lambda e: abs(row[e])))
    for e, gate in enumerate(row):
      if gate:
        p = abs(gate) / total
        entropy -= p * np.log(p) / 30
        shares[e] += gate / 30
  found = report.gate_summary(gates)
  assert found["entropy"] == pytest.approx(entropy)
  assert found["switches"] == sum(a != b for a, b in itertools.pairwise(leads))
  np.testing.assert_allclose(found["shares"], shares)
  lines = some_map().about()
  assert lines[0].startswith("router centroid · gates refreshed every token")
  assert "10 tokens" in lines[0] and "nats of at most 1.10" in lines[0]
  assert re.search(r"A gsm8k \d+%, B arc_challenge \d+%, C codealp", lines[1])


def test_letters_stand_in_their_own_part():
  found = some_map(pieces=["x"] * 90, gates=random_gates(90, 3))
  places = found.letter_places(0.05)
  assert set(places) == {0, 1, 2}
  for expert, (x, y) in places.items():
    near = slice(int(90 * x) - 2, int(90 * x) + 3)
    high = found.heights[near, expert].mean()
    assert high - found.gates[near, expert].mean() < y < high
  assert found.letter_places(1.0) == {}


# -----------------------------------------------------------------------------
# The page.


class Page(HTMLParser):
  """What a browser would make of a page."""

  def __init__(self, text):
    super().__init__()
    self.tags, self.open, self.found, self.policy = [], [], [], ""
    self.feed(text)
    self.close()

  def handle_starttag(self, tag, attributes):
    attributes = dict(attributes)
    self.tags.append((tag, sorted(attributes)))
    node = {"tag": tag, "text": "", "in": list(self.open), **attributes}
    self.found.append(node)
    if attributes.get("http-equiv") == "Content-Security-Policy":
      self.policy = attributes["content"]
    if tag not in ("meta", "path", "rect"):
      self.open.append(node)

  def handle_startendtag(self, tag, attributes):
    self.handle_starttag(tag, attributes)

  def handle_endtag(self, tag):
    assert self.open.pop()["tag"] == tag

  def handle_data(self, data):
    for node in self.open:
      node["text"] += data

  def all(self, **wanted):
    return [
      node
      for node in self.found
      if all(node.get(key) == value for key, value in wanted.items())
    ]

  def records(self):
    (node,) = self.all(tag="script", type="application/json")
    return json.loads(node["text"])


def test_page_has_every_token_in_order_as_it_leads():
  one = some_map()
  page = Page(report.heatmap_html([one]))
  tokens = page.all(role="option")
  assert [token["text"] for token in tokens] == one.pieces
  (prompt,) = page.all(**{"class": "prompt"})
  assert prompt["text"] == one.prompt
  (box,) = page.all(role="listbox")
  before = None
  for i, token in enumerate(tokens):
    assert token["in"][-1] is box
    first, second = np.sort(one.gates[i])[::-1][:2]
    lead = one.gates[i].tolist().index(first)
    step = int(np.ceil(9 * (first - second)))
    assert {f"e{lead}", f"s{step}"} <= set(token["class"].split())
    # A letter says without colour where the lead changes.
    letters = [
      node["data-lead"]
      for node in page.found
      if "data-lead" in node and token in node["in"]
    ]
    assert letters == ([] if lead == before else ["ABC"[lead]])
    assert token["tabindex"] == ("-1" if i else "0")
    before = lead
  # What shows nothing has a name and a class that shows it.
  named = {
    one.pieces[i]: token["aria-label"]
    for i, token in enumerate(tokens)
    if "aria-label" in token
  }
  assert named == {
    "\n": "new line", "    ": "4 spaces", "\t": "tab", "": "no visible text",
  }  # fmt: skip
  kinds = [token["class"].split()[0] for token in tokens]
  assert [kinds[i] for i in (3, 4, 6, 7)] == [
    "blank",
    "blank",
    "blank",
    "empty",
  ]
  facts = [node["text"] for node in page.all(**{"class": "facts"})]
  assert facts == one.about()


def test_page_holds_what_it_is_made_from():
  maps = [some_map(), some_map(prompt="Où?", pieces=["</script>"] * 10)]
  page = Page(report.heatmap_html(maps))
  records = page.records()
  assert len(page.all(tag="section")) == len(records) == 2
  for one, record in zip(maps, records, strict=True):
    np.testing.assert_allclose(record.pop("gates"), one.gates, atol=5e-5)
    assert record == {
      "prompt": one.prompt, "pieces": one.pieces, "experts": EXPERTS,
      "facts": one.facts,
    }  # fmt: skip


def test_page_draws_the_gates_it_holds():
  one = some_map(pieces=["x"] * 40, gates=np.repeat(random_gates(10, 3), 4, 0))
  page = Page(report.heatmap_html([one]))
  paths = page.all(tag="path")
  # Drawn from the top down, each to the bottom.
  assert [path["class"] for path in paths] == ["e2", "e1", "e0"]
  for expert, path in zip((2, 1, 0), paths, strict=True):
    drawn, x, height = np.full(40, np.nan), 0, None
    steps = re.findall(r"([HV])([\d.e-]+)", path["d"].partition("M0 1")[2])
    for letter, number in steps:
      if letter == "H":
        drawn[x : int(number)] = height
        x = int(number)
      else:
        height = 1 - float(number)
    want = one.gates[:, : expert + 1].sum(axis=1)
    np.testing.assert_allclose(drawn, want, atol=1e-3)
  legend = [node["text"] for node in page.all(tag="li")]
  assert legend == [
    f"{'ABC'[i]}{name}{one.gates[:, i].mean():.2f}"
    for i, name in enumerate(EXPERTS)
  ]


def test_foreign_text_is_never_markup():
  def page(words):
    pieces = [*words, "end"]
    gates = random_gates(len(pieces), len(words))
    facts = dict.fromkeys(words, words[0])
    one = HeatMap("".join(words), pieces, gates, words, facts)
    return Page(report.heatmap_html([one]))

  hostile = page(list(HOSTILE))
  harmless = page([f"word {i}" for i in range(len(HOSTILE))])
  assert hostile.tags == harmless.tags
  shown = [token["text"] for token in hostile.all(role="option")]
  assert shown == [heatmap.visible(text) for text in [*HOSTILE, "end"]]
  assert shown[-6:-3] == ["␀␛[31m", "\ufffd", "\ufffd\ufffd"]
  (data,) = hostile.all(tag="script", type="application/json")
  assert not set(data["text"]) & set("<>&")
  (record,) = hostile.records()
  assert record["pieces"] == [*HOSTILE, "end"]
  assert record["experts"] == list(HOSTILE)


def test_page_reaches_for_nothing_and_runs_its_own_script_alone():
  text = report.heatmap_html([some_map(prompt="see " + HOSTILE[0])])
  page = Page(text)
  for name, attributes in page.tags:
    assert name not in ("link", "img", "iframe", "base", "object", "a"), name
    for attribute in attributes:
      assert attribute not in ("src", "href", "style", "srcset", "xlink:href")
      assert not attribute.startswith("on")
  (style,) = page.all(tag="style")
  data, script = page.all(tag="script")
  assert data["type"] == "application/json"
  for own in (style, script):
    assert not re.search(r"url\(|@import|https?:|eval|innerHTML", own["text"])
  digests = [
    base64.b64encode(hashlib.sha256(own["text"].encode()).digest()).decode()
    for own in (style, script)
  ]
  assert " ".join(page.policy.split()) == (
    f"default-src 'none'; style-src 'sha256-{digests[0]}'; script-src"
    f" 'sha256-{digests[1]}'; base-uri 'none'; form-action 'none'"
  )
  # The policy comes before all that it is for.
  kinds = [tag for tag, _ in page.tags]
  policy = page.found.index(
    page.all(**{"http-equiv": "Content-Security-Policy"})[0]
  )
  assert policy < min(kinds.index("style"), kinds.index("script"))


def test_all_that_is_written_can_be_read():
  """WCAG's AA: a contrast of 4.5, in both modes and on every tint."""
  style = Page(report.heatmap_html([some_map()])).all(tag="style")[0]["text"]
  light, dark = (
    dict(re.findall(r"--(\w+): ([#\w.]+)", block))
    for block in re.findall(r":root \{(.*?)\}", style, re.DOTALL)
  )
  for mode in (light, dark):
    for paper in ("paper", "raised"):
      assert colours.contrast(mode["ink"], mode[paper]) >= 7
      assert colours.contrast(mode["soft"], mode[paper]) >= 4.5
    for colour in COLOURS:
      for strength in np.linspace(0, 1, 10):
        opacity = colours.tint(strength) * float(mode["deep"])
        tint = colours.mix(colour, mode["paper"], opacity)
        assert colours.contrast(mode["ink"], tint) >= 4.5, (colour, strength)
  for i, colour in enumerate(COLOURS):
    rgb = " ".join(map(str, colours.channels(colour)))
    ink = colours.ink(colour)
    assert f".e{i} {{ --c: {rgb}; --on: {ink} }}" in style
    assert colours.contrast(ink, colour) >= 4.5
    tint = colours.mix(colour, picture.PAPER, colours.tint(1))
    assert colours.contrast(picture.INK, tint) >= 4.5


def test_many_experts_share_colours_but_not_letters():
  experts = [f"expert {i}" for i in range(9)]
  one = HeatMap("p", ["a", "b"], np.eye(9)[[0, 7]], experts)
  page = Page(report.heatmap_html([one]))
  first, second = page.all(role="option")
  assert first["class"] == second["class"] == "e0 s9"
  assert [node.get("data-lead") for node in page.all(tag="i")] == ["A", "H"]


def test_the_page_ships_with_the_package():
  project = tomllib.loads((ROOT / "pyproject.toml").read_text())
  data = project["tool"]["setuptools"]["package-data"]
  shipped = {
    ROOT / package.replace(".", "/") / name
    for package, names in data.items()
    for name in names
  }
  others = {
    file
    for file in (ROOT / "tokenlora_jax").rglob("*")
    if file.is_file() and file.suffix not in (".py", ".pyc")
  }
  assert others == shipped
