"""Heat maps to draw."""

import numpy as np

from tokenlora_jax.report import HeatMap

EXPERTS = ["gsm8k", "arc_challenge", "codealpaca"]

# Texts that try to be markup.
HOSTILE = (
  "</script><img src=x onerror=alert(1)>", "<!--<script>", "-->", "]]>",
  "</textarea></title></style><svg onload=alert(1)>", "' onfocus=alert(1) x='",
  '"><script>alert(1)</script>', "&lt;b&gt;", "@data@@script@", "\x00\x1b[31m",
  "\ud800", "\u202e\u2066", "javascript:alert(1)", "</span></div></section>",
)  # fmt: skip


def random_gates(tokens, experts, seed=0):
  scores = np.random.default_rng(seed).normal(size=(tokens, experts))
  return np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)


def some_map(**changes):
  pieces = [
    " In",
    " May",
    " 1 < 2 & 3",
    "\n",
    "    ",
    "def",
    "\t",
    "",
    ".\n",
    "é",
  ]
  settings = dict(
    prompt="Question: <b>?\n\nAnswer:", pieces=pieces,
    gates=random_gates(len(pieces), 3), experts=EXPERTS,
    facts={"router": "centroid", "gates refreshed": "every token"},
  )  # fmt: skip
  return HeatMap(**settings | changes)
