"""Frozen settings of routers and of decoding."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

from tokenlora_jax.config.errors import check, check_literals


@dataclasses.dataclass(frozen=True)
class RouterConfig:
  """Settings of the router, which computes the experts' gates.

  The first five apply to any router. Where `top_k` or `temperature` is None,
  the router uses the value of its own paper.

  Attributes:
    name: the router. Gates for whole sequences: base, one-hot, uniform, sum,
      fixed, centroid (the paper's), cbtm, classifier, posterior, ariadne,
      lorauter, logo, hilora. Gates for each position inside the layers: arrow,
      spectr, phatgoose, lora-flow, x-lora, switch.
    top_k: keep the k largest gates, scaled to the same sum; 0 keeps all.
    temperature: gates^(1 / temperature), scaled to the same sum: below 1 is
      sharper, above 1 flatter.
    threshold: if no gate reaches this, all are set to 0: the base alone.
    smoothing: weight of the old gates at a refresh: s old + (1 - s) new.
    encoder: text encoder of centroid, cbtm, classifier, ariadne, lorauter and
      hilora: `minilm` (all-MiniLM-L6-v2, the paper's) or `hidden` (the base's
      own mean-pooled last hidden state, inside the graph).
    minilm: all-MiniLM-L6-v2's folder, hub id or `package:NAME`.
    window: the part of a text that MiniLM reads if it has more than 256 word
      pieces: its `start` (as in the paper) or its `end`.
    clusters: centroid, cbtm, ariadne: centroids per expert, found by k-means;
      1 is the mean.
    sharpen: centroid: factor on the largest similarity before the softmax (4 in
      the paper).
    expert: one-hot: the expert's name.
    gates: fixed: one gate per expert.
    prior: posterior: the router that gives the first gates, at the prompt.
    evidence: posterior: the tokens that update the belief: the `answer` as it
      is decoded, or `all`, which adds the prompt (for adapters trained with
      `data.loss-on all`).
    share: posterior: share of the belief that is spread evenly over the experts
      after each token, so that the lead can change (Herbster and Warmuth's
      fixed share).
    measure: logo: score of an adapter's output: its `norm`, or the inverse of
      its `entropy`.
    rank_share: hilora: share of an adapter's rank-one components that are used
      at each token.
    centroid_rows: training rows per task from which centroids are averaged and
      routers are fitted.

  Example:
    >>> RouterConfig("centroid", encoder="hidden", top_k=2).sharpen
    4.0
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
  """Settings of decoding: router calls, mixing, KV cache, sampling, stops.

  Attributes:
    max_new_tokens: the most tokens to decode.
    refresh_every: tokens between two router calls; 0 calls it once, at the
      prompt.
    rule: how gates mix the adapters: `exact` (their weighted sum),
      `peft_linear` and `peft040` (PEFT's combination "linear", as of today and
      of 0.4.0), or `probabilities` (each expert predicts alone, and the
      predictions are mixed).
    cache: keys and values in the KV cache that were computed under older gates:
      `reuse` keeps them, `recompute` runs the whole text again at each refresh,
      `remix` applies the current gates to the cached values (for adapters on v
      but not on k).
    temperature: of the sampling; 0, or less than 1.2e-38, is greedy.
    top_k: sample from the k most likely tokens; 0 is all.
    top_p: sample from the most likely tokens whose probabilities reach this
      sum.
    seed: seeds the sampling.
    stop_at_eos: whether an end token of the base ends a sequence.
    stop: strings that end a sequence (they are cut from the text); a special
      token's name stands for that token.
    batch: the most prompts that infer.py decodes at once. Greedy texts do not
      depend on it; texts sampled at a temperature do.

  Raises:
    InputError: a setting is not allowed.

  Example:
    >>> DecodeConfig(max_new_tokens=8, temperature=0.7).rule
    'exact'
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
  batch: int = 16

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
    check(self.batch >= 1, "decode.batch", self.batch, "at least 1")
