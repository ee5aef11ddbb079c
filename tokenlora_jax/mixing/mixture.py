"""Computes what the adapters add in a forward pass, by gates and a rule.

  z_e = A_e x,  m = mix(z, gates),  y = W x + sum_e B_e m_e

Axis letters: B batch, T length, N query heads, K kv heads, G = N/K, H head
width, E experts, R rank, M rows that read one sequence.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, Shaped
import numpy as np
from numpy.typing import ArrayLike

from tokenlora_jax.config import InputError
from tokenlora_jax.mixing.router import Router
from tokenlora_jax.mixing.rules import Rule, get_rule, mix_probabilities
from tokenlora_jax.model.attention import causal_mask
from tokenlora_jax.model.cache import KV, Cache
from tokenlora_jax.model.llama import Llama
from tokenlora_jax.model.lora import Adapters, LayerLoras, Lora


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Routed:
  """The adapters of one projection, and an in-layer router's prototype of it.

  Attributes:
    lora: the adapters.
    prototype: arrays that the router compares the projection's input with.
  """

  lora: Lora
  prototype: Any


def route_layers(
  layers: Sequence[LayerLoras] | LayerLoras, router: Router | None
) -> Sequence[Mapping[str, Lora | Routed]] | LayerLoras:
  """Joins each layer's adapters with an in-layer router's prototypes.

  Args:
    layers: one mapping per layer.
    router: any router; one without prototypes changes nothing.

  Example:
    >>> lora = Lora(jnp.ones((2, 1, 4)), jnp.ones((2, 1, 4)), jnp.ones(2))
    >>> route_layers([{"q": lora}], None)[0]["q"] is lora
    True
  """
  if router is None or not router.prototypes:
    return layers
  return tuple(
    routed(layer, known)
    for layer, known in zip(layers, router.prototypes, strict=True)
  )


def routed(
  loras: LayerLoras, prototypes: Mapping[str, Any]
) -> dict[str, Routed]:
  """Joins one layer's adapters with the prototypes of their projections.

  Args:
    loras: the adapters of one layer, or of stacked ones.
    prototypes: the prototype of each projection.

  Example:
    >>> lora = Lora(jnp.ones((2, 1, 4)), jnp.ones((2, 1, 4)), jnp.ones(2))
    >>> routed({"q": lora}, {"q": jnp.zeros((2, 4))})["q"].prototype.shape
    (2, 4)
  """
  return {name: Routed(lora, prototypes[name]) for name, lora in loras.items()}


@dataclasses.dataclass(frozen=True)
class Mixture:
  """Computes what adapters add to a projection: sum_e B_e mix(A_e x, gates).

  Attributes:
    rule: how the gates mix the adapters.
    gates: float32[B, E] or [B, T, E].
    router: an in-layer router, whose gates multiply `gates`; or None.
    seen: a list that collects the in-layer gates, float32[B, T, E] per
      projection, in the order in which they run; or None. Only for layers in a
      list: a scan would keep them inside.

  Example:
    >>> lora = Lora(jnp.ones((2, 1, 4)), jnp.ones((2, 1, 4)), jnp.ones(2))
    >>> half = Mixture(get_rule("exact"), jnp.array([[0.5, 0.0]]))
    >>> half(lora, jnp.ones((1, 1, 4))).tolist()
    [[[2.0, 2.0, 2.0, 2.0]]]
  """

  rule: Rule
  gates: Float[Array, "B E"] | Float[Array, "B T E"]
  router: Router | None = None
  seen: list[Float[Array, "B T E"]] | None = None

  def __call__(
    self,
    lora: Lora | Routed,
    x: Float[Array, "B T I"],
    keys: Key[Array, " B"] | None = None,
  ) -> Float[Array, "B T O"]:
    """Returns the adapters' output: [B, T, out] for x [B, T, in]."""
    del keys  # No dropout.
    low, gates = self.down(lora, x), self.gates
    gates = gates[:, None, :, None] if gates.ndim == 2 else gates[..., None]
    if isinstance(lora, Routed):
      found = self.router.position_gates(lora.prototype, lora.lora, x, low)
      found = found if found.ndim == 4 else found[..., None]
      gates, lora = gates * found, lora.lora
      if self.seen is not None:
        self.seen.append(jnp.mean(gates, axis=-1))
    mixed = self.rule.mix(low, gates, lora.scaling[:, None])
    b = lora.b.reshape(-1, lora.b.shape[-1]).astype(x.dtype)
    return jnp.einsum("btk,ko->bto", _joined(mixed).astype(x.dtype), b)

  def down(
    self, lora: Lora | Routed, x: Float[Array, "B T I"]
  ) -> Float[Array, "B T E R"]:
    """Returns the rank activations z, float32[B, T, E, R].

    Args:
      lora: the projection's adapters.
      x: [B, T, in], the projection's input.
    """
    lora = lora.lora if isinstance(lora, Routed) else lora
    experts, rank, _ = lora.a.shape
    # One plain matrix: a product over two axes would be transposed first.
    a = lora.a.reshape(experts * rank, -1).astype(x.dtype)
    low = jnp.einsum("bti,ki->btk", x, a, preferred_element_type=jnp.float32)
    return low.reshape(*low.shape[:2], experts, rank)

  def up(
    self, lora: Lora, low: Float[Array, "B T N ER"], kv_heads: int
  ) -> Float[Array, "B T N H"]:
    """Returns what the adapters of v add, after attention instead of before.

    The values' adapters are linear in their rank activations z, and attention
    is a weighted sum over positions. So attention may sum z with the same
    weights, and the current gates may multiply that sum.

    Args:
      lora: the adapters of v.
      low: [B, T, N, E*R], z summed with each query head's weights.
      kv_heads: K.

    Returns:
      [B, T, N, H].
    """
    experts, rank, size = lora.b.shape
    batch, length, heads, _ = low.shape
    gates = self.gates if self.gates.ndim == 3 else self.gates[:, None]
    mixed = self.rule.mix(
      low.reshape(batch, length, heads, experts, rank).astype(jnp.float32),
      gates[:, :, None, :, None],
      lora.scaling[:, None],
    ).astype(low.dtype)
    by_kv_head = mixed.reshape(batch, length, kv_heads, -1, experts * rank)
    b = lora.b.reshape(experts * rank, kv_heads, size // kv_heads)
    added = jnp.einsum("btkgr,rkh->btkgh", by_kv_head, b.astype(low.dtype))
    return added.reshape(batch, length, heads, -1)


def _joined(low: Float[Array, "B T E R"]) -> Float[Array, "B T ER"]:
  """Returns [B, T, E, R] as [B, T, E*R]."""
  return low.reshape(*low.shape[:2], -1)


def expert_rows(
  x: Shaped[Array | np.ndarray, "B ..."], copies: int
) -> Shaped[Array, "BM ..."]:
  """Repeats each row of [B, ..]: [B * copies, ..], copies side by side.

  Args:
    x: [B, ..].
    copies: the number of copies of each row.

  Example:
    >>> expert_rows(jnp.array([1, 2]), 2).tolist()
    [1, 1, 2, 2]
  """
  return jnp.repeat(x, copies, axis=0)


def one_hot_rows(
  batch: int, experts: int
) -> Float[Array, "{batch*experts} {experts}"]:
  """Returns gates [B * E, E] with which each expert reads each row alone.

  Args:
    batch: B.
    experts: E.

  Example:
    >>> one_hot_rows(1, 2).tolist()
    [[1.0, 0.0], [0.0, 1.0]]
  """
  return jnp.tile(jnp.eye(experts), (batch, 1))


def resolve(
  rule: str, cache: str, router: Router, adapters: Adapters
) -> tuple[Rule, Router]:
  """Looks up a rule, binds the router to the experts, and checks both.

  Decoding and evaluation both call it, so they refuse the same combinations of
  rule, cache policy and router.

  Args:
    rule: the name of the rule that mixes the adapters.
    cache: the cache policy.
    router: computes the gates.
    adapters: the experts.

  Raises:
    InputError: there is no such rule, or the three do not fit together.

  Example:
    >>> from tokenlora_jax import load_base, make_router, random_adapters
    >>> adapters = random_adapters(load_base("random:tiny"), experts=2, rank=4)
    >>> rule, router = resolve(
    ...   "exact", "reuse", make_router("uniform"), adapters
    ... )
    >>> rule.name, router.experts
    ('exact', 2)
  """
  found, router = get_rule(rule), router.bind(adapters.names)
  if found.of_outputs and router.prototypes:
    raise InputError(
      f"decode.rule: {rule!r} is not allowed; want another with a router"
      " that decides inside the layers, since here each expert reads alone"
    )
  if found.of_outputs and router.may_be_zero:
    raise InputError(
      f"decode.rule: {rule!r} is not allowed; want another with this"
      " router (base, or a threshold): where all gates are 0 no expert predicts"
    )
  if found.of_outputs and router.may_be_negative:
    raise InputError(
      f"decode.rule: {rule!r} is not allowed; want another with this"
      " router: its gates may be negative, and probabilities are not"
    )
  if cache == "remix":
    _check_remix(router, adapters)
  return found, router


def _check_remix(router: Router, adapters: Adapters) -> None:
  adapted = {name for layer in adapters.layers for name in layer}
  reason = ""
  if "k" in adapted:
    reason = "adapters on k change keys, which are kept rotated and read as is"
  elif "v" not in adapted:
    reason = "no adapter touches v, so no value depends on the gates"
  elif router.prototypes:
    reason = "gates that a position decides in the layers never change"
  if reason:
    raise InputError(
      f"decode.cache: 'remix' is not allowed; want reuse or recompute, since"
      f" {reason}"
    )


class Read(NamedTuple):
  """The result of a forward pass over tokens.

  Attributes:
    hidden: [B, T, D], the last hidden states.
    cache: keys and values, as `Llama` returns them.
    looked: the base's own cache, for a router with `looks_first`; or None.
    gates: of an in-layer router float32[B, T, E], the mean over the adapted
      projections; otherwise the given gates.
  """

  hidden: Float[Array, "B T D"]
  cache: Cache | tuple[KV, ...] | None
  looked: Cache | tuple[KV, ...] | None
  gates: Float[Array, "B E"] | Float[Array, "B T E"] | None


def read(
  base: Llama,
  tokens: Int[Array | np.ndarray, "B T"],
  positions: Int[Array | np.ndarray, "B T"],
  mask: Bool[Array, "B T S"],
  *,
  rule: Rule | None = None,
  loras: Sequence[LayerLoras] | LayerLoras | None = None,
  gates: Float[Array | np.ndarray, "B E"]
  | Float[Array | np.ndarray, "B T E"]
  | None = None,
  router: Router | None = None,
  remix: bool = False,
  caches: tuple[Cache | None, Cache | None] = (None, None),
) -> Read:
  """Runs the base over tokens with its adapters mixed by gates; pure.

  Decoding, evaluation and `forward` all call it.

  Args:
    base: the Llama.
    tokens: int32[B, T].
    positions: int32[B, T].
    mask: bool[B, T, S], true where a token may look.
    rule: how gates mix the adapters; None is the base alone.
    loras: the adapters of each layer.
    gates: float32[B, E] or [B, T, E].
    router: an in-layer router, whose gates multiply `gates`; others do nothing.
    remix: whether the current gates apply to the cached values.
    caches: the cache, and the base's own, of the tokens before.
  """
  cache, looked = caches
  if rule is None:
    hidden, cache = base(tokens, positions, mask, cache)
    return Read(hidden, cache, looked, gates)
  if router is not None and router.looks_first:
    first, looked = base(tokens, positions, mask, looked)
    router = router.look(first)
  seen: list[Float[Array, "B T E"]] = []
  mixture = Mixture(rule, gates, router, seen)
  hidden, cache = base(
    tokens, positions, mask, cache,
    loras=route_layers(loras, router),
    adapt=mixture,
    remix=mixture if remix else None,
  )  # fmt: skip
  if seen:
    gates = jnp.mean(jnp.stack(seen), axis=0)
  return Read(hidden, cache, looked, gates)


def forward(
  base: Llama,
  tokens: ArrayLike,
  adapters: Adapters | None = None,
  gates: ArrayLike | None = None,
  rule: str = "exact",
  router: Router | None = None,
) -> Float[Array, "B T V"]:
  """Logits of whole texts under a mixture of adapters.

  Args:
    base: from `load_base`.
    tokens: int[B, T].
    adapters: from `load_adapters`; none is the base alone.
    gates: float[B, E], or [B, T, E] for gates of each token; needed with
      adapters, unless a router decides inside the layers.
    rule: how the gates mix the adapters.
    router: an in-layer router, such as `arrow`; its gates multiply `gates`.

  Returns:
    float32[B, T, V]; under the rule `probabilities` log-probabilities.

  Raises:
    InputError: the adapters do not fit the base, or the router is not in-layer.
    ValueError: the gates are missing or have another shape.

  Example:
    >>> from tokenlora_jax import load_base
    >>> forward(load_base("random:tiny"), [[1, 2, 3]]).shape
    (1, 3, 260)
  """
  tokens = jnp.asarray(tokens, jnp.int32)
  if adapters is None:
    return _forward(base, tokens, None, None, None, None)
  adapters.check(base.config)
  experts = len(adapters.names)
  if router is not None:
    if not router.prototypes:
      raise InputError("router: give `gates`; it does not look inside layers")
    router = router.bind(adapters.names)
    if gates is None:
      gates = jnp.ones((len(tokens), experts))
  gates = check_gates(gates, tokens.shape, experts)
  loras = adapters.layers
  if base.stacked:
    if router is not None:
      raise InputError("router: wants the list layout: load_base(path)")
    stacked = adapters.stack(base.config.layers)
    loras = jax.tree.map(lambda x: x.swapaxes(0, 1), stacked)
  return _forward(base, tokens, loras, gates, router, get_rule(rule))


def check_gates(
  gates: ArrayLike | None, shape: tuple[int, int], experts: int
) -> Float[Array, "B {experts}"] | Float[Array, "B T {experts}"]:
  """Returns gates as float32[B, E] or [B, T, E].

  Args:
    gates: numbers of one of these shapes.
    shape: (B, T).
    experts: E.

  Raises:
    ValueError: there are no gates, or their shape is another.

  Example:
    >>> check_gates([[1, 0]], (1, 3), 2).tolist()
    [[1.0, 0.0]]
  """
  if gates is None:
    raise ValueError(f"adapters need gates: [B, E] = [{shape[0]}, {experts}]")
  gates = jnp.asarray(gates, jnp.float32)
  if gates.shape not in ((shape[0], experts), (*shape, experts)):
    raise ValueError(
      f"gates of shape {list(gates.shape)}: want [B, E] ="
      f" [{shape[0]}, {experts}] or [B, T, E] = [{shape[0]}, {shape[1]},"
      f" {experts}]"
    )
  return gates


@functools.partial(jax.jit, static_argnames="rule")
def _forward(base, tokens, loras, gates, router, rule):
  batch, rows, mixing = tokens.shape[0], tokens, gates
  if rule is not None and rule.of_outputs:
    experts = gates.shape[-1]
    rows, mixing = expert_rows(tokens, experts), one_hot_rows(batch, experts)
  positions = jnp.broadcast_to(jnp.arange(rows.shape[1]), rows.shape)
  mask = causal_mask(jnp.ones_like(rows))
  found = read(
    base, rows, positions, mask,
    rule=rule, loras=loras, gates=mixing, router=router,
  )  # fmt: skip
  logits = base.logits(found.hidden)
  if rule is None or not rule.of_outputs:
    return logits
  log_probs = jax.nn.log_softmax(logits)
  log_probs = log_probs.reshape(batch, experts, *logits.shape[1:])
  gates = gates[:, :, None] if gates.ndim == 2 else gates.swapaxes(1, 2)
  return mix_probabilities(log_probs, gates[..., None])
