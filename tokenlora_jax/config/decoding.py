"""How gates are decided and text is made."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

from tokenlora_jax.config.errors import check, check_literals


@dataclasses.dataclass(frozen=True)
class RouterConfig:
  """Who decides the gates.

  The first settings shape the gates of any router; those that are left out are
  the router's own, as its paper has them.

  Attributes:
    name: for whole sequences: base, one-hot, uniform, sum, fixed, centroid (the
      paper's), cbtm, classifier, posterior, ariadne, lorauter, logo, hilora; for
      each position inside the layers: arrow, spectr, phatgoose, lora-flow,
      x-lora, switch.
    top_k: keep the k largest gates, scaled to the same sum; 0 is all.
    temperature: gates^(1 / temperature), scaled to the same sum: below 1 is
      sharper, above 1 flatter.
    threshold: where no gate reaches this, all are 0: the base alone.
    smoothing: share of the last gates that stays at a refresh.
    encoder: of centroid, cbtm, classifier, ariadne, lorauter and hilora: `minilm`
      (all-MiniLM-L6-v2, the paper's) or `hidden` (the base's own mean-pooled
      last hidden state, inside the graph).
    minilm: where all-MiniLM-L6-v2 is: a folder, a hub id or `package:NAME`.
    window: what MiniLM reads of a text of more than 256 word pieces: its
      `start` (as the paper) or its `end`.
    clusters: of centroid, cbtm and ariadne: how many centroids an expert has,
      found by k-means; 1 is the mean.
    sharpen: of centroid: what the largest similarity is multiplied by before
      the softmax (4 in the paper).
    expert: of one-hot: the expert's name.
    gates: of fixed: one number an expert.
    prior: of posterior: the router whose gates at the prompt it starts from.
    evidence: of posterior: what counts for an expert, the `answer` as it is
      made, or `all`, the prompt too (for adapters trained with
      `data.loss-on all`).
    share: of posterior: how much of the belief is shared out evenly after each
      token, so that the lead can change (Herbster and Warmuth's fixed share).
    measure: of logo: what of an adapter's output counts, its `norm` or the
      inverse of its `entropy`.
    rank_share: of hilora: the share of an adapter's rank-one parts that stays
      at a token.
    centroid_rows: training rows a task whose texts are averaged into a
      centroid, or fitted to.
  """

  name: str = "centroid"
  top_k: int | None = None
  temperature: float | None = None
  threshold: float = 0.0
  smoothing: float = 0.0
  encoder: Literal["minilm", "hidden"] = "minilm"
  minilm: str = "sentence-transformers/all-MiniLM-L6-v2"
  window: Literal["start", "end"] = "start"
  clusters: int = 1
  sharpen: float = 4.0
  expert: str = ""
  gates: tuple[float, ...] = ()
  prior: str = "uniform"
  evidence: Literal["answer", "all"] = "answer"
  share: float = 0.0
  measure: Literal["norm", "entropy"] = "norm"
  rank_share: float = 0.4
  centroid_rows: int = 256

  def __post_init__(self):
    check_literals(self, "router.")
    check(
      self.top_k is None or self.top_k >= 0,
      "router.top-k", self.top_k, "0 (all) or more",
    )  # fmt: skip
    check(
      self.temperature is None or 0 < self.temperature < math.inf,
      "router.temperature", self.temperature, "a finite number more than 0",
    )  # fmt: skip
    check(
      0 <= self.threshold <= 1,
      "router.threshold", self.threshold, "0 (off) to 1",
    )  # fmt: skip
    check(
      0 <= self.smoothing < 1, "router.smoothing", self.smoothing, "0 <= s < 1"
    )
    check(self.clusters >= 1, "router.clusters", self.clusters, "at least 1")
    check(0 <= self.share < 1, "router.share", self.share, "0 <= share < 1")
    check(
      0 < self.rank_share <= 1,
      "router.rank-share", self.rank_share, "0 < share <= 1",
    )  # fmt: skip
    check(
      self.centroid_rows >= 1,
      "router.centroid-rows", self.centroid_rows, "at least 1",
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class DecodeConfig:
  """How text is made.

  Attributes:
    max_new_tokens: the most tokens to make.
    refresh_every: tokens between two router calls; 0 is once, at the prompt.
    rule: what gates mean: `exact` (the weighted sum of the adapters),
      `peft_linear` and `peft040` (what PEFT's combination "linear" makes of
      them, today and in 0.4.0), or `probabilities` (each expert predicts alone,
      and the predictions are mixed).
    cache: what becomes of the keys and values read under older gates: `reuse`
      keeps them, `recompute` reads the text anew at each refresh, `remix` reads
      values under today's gates (adapters on v but not on k).
    temperature: 0, or less than 1.2e-38, is greedy.
    top_k: keep the k most likely tokens; 0 is all.
    top_p: keep the most likely tokens whose probabilities reach this sum.
    seed: of the sampling.
    stop_at_eos: whether the end token ends a sequence.
    stop: strings that end a sequence (they are cut from the text).
  """

  max_new_tokens: int = 64
  refresh_every: int = 2
  rule: str = "exact"
  cache: Literal["reuse", "recompute", "remix"] = "reuse"
  temperature: float = 0.0
  top_k: int = 0
  top_p: float = 1.0
  seed: int = 0
  stop_at_eos: bool = True
  stop: tuple[str, ...] = ()

  def __post_init__(self):
    check_literals(self, "decode.")
    check(
      self.max_new_tokens >= 1,
      "decode.max-new-tokens", self.max_new_tokens, "at least 1",
    )  # fmt: skip
    check(
      self.refresh_every >= 0,
      "decode.refresh-every", self.refresh_every, "0 (once) or more",
    )  # fmt: skip
    check(
      0 <= self.temperature < math.inf,
      "decode.temperature", self.temperature, "a finite number, 0 or more",
    )  # fmt: skip
    check(self.top_k >= 0, "decode.top-k", self.top_k, "0 (all) or more")
    check(0 < self.top_p <= 1, "decode.top-p", self.top_p, "0 < p <= 1")
