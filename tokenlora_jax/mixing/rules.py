"""What a set of gates means: how several adapters become one map.

A rule is a frozen dataclass called with (lora, x, gates), and gives what the
adapters add to the linear map's output.

Axis letters: B batch, T length, E experts, R rank.
"""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
import functools

import jax
import jax.numpy as jnp

from tokenlora_jax.config import check_choice
from tokenlora_jax.model.attention import causal_mask
from tokenlora_jax.model.llama import Adapt, Llama
from tokenlora_jax.model.lora import Adapters, Lora

# (lora, x [B, T, in], gates [B, E] or [B, T, E]) -> [B, T, out]
Rule = Callable[[Lora, jax.Array, jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class Exact:
  """The weighted sum of the experts' outputs, with no cross terms.

  y = sum_e gates_e scaling_e (x A_e^T) B_e, which is one adapter of rank E*R:
  the rows of all A_e in one matrix, its output times gates and scaling, and the
  rows of all B_e in another. PEFT calls the same mixture "cat". The gates enter
  once, between A and B, so each row and each token may have its own.

  Args:
    lora: a [E, R, in], b [E, R, out], scaling [E].
    x: [B, T, in].
    gates: float32[B, E] or [B, T, E].

  Returns:
    [B, T, out] in x's dtype.

  Example:
    >>> one = Lora(jnp.ones((1, 2, 3)), jnp.ones((1, 2, 4)), jnp.ones(1))
    >>> Exact()(one, jnp.ones((1, 1, 3)), jnp.array([[0.5]])).tolist()
    [[[3.0, 3.0, 3.0, 3.0]]]
  """

  def __call__(self, lora, x, gates):
    if gates.ndim == 2:
      gates = gates[:, None]
    experts, rank, _ = lora.a.shape
    # One plain matrix each: a product over two axes would be transposed first.
    a = lora.a.reshape(experts * rank, -1).astype(x.dtype)
    b = lora.b.reshape(experts * rank, -1).astype(x.dtype)
    low = jnp.einsum("bti,ki->btk", x, a, preferred_element_type=jnp.float32)
    weights = jnp.repeat(gates * lora.scaling, rank, axis=-1)
    return jnp.einsum("btk,ko->bto", (low * weights).astype(x.dtype), b)


RULES: dict[str, Rule] = {"exact": Exact()}


def get_rule(name: str) -> Rule:
  """Returns the rule of a name.

  Raises:
    InputError: there is no such rule.

  Example:
    >>> get_rule("exact")
    Exact()
  """
  check_choice("rule", name, tuple(RULES))
  return RULES[name]


def mixture(rule: Rule, gates: jax.Array) -> Adapt:
  """Returns what a `Llama` calls at each adapted map, under these gates."""
  return lambda lora, x, key: rule(lora, x, gates)


def forward(
  base: Llama,
  tokens,
  adapters: Adapters | None = None,
  gates=None,
  rule: str = "exact",
) -> jax.Array:
  """Logits of whole texts under a mixture of adapters.

  Args:
    base: from `load_base`.
    tokens: int[B, T].
    adapters: from `load_adapters`; none is the base alone.
    gates: float[B, E], or [B, T, E] for gates of each token; needed with
      adapters.
    rule: what the gates mean.

  Returns:
    float32[B, T, V].

  Raises:
    InputError: adapters that do not fit the base, gates of a wrong shape.

  Example:
    >>> from tokenlora_jax import load_base
    >>> forward(load_base("random:tiny"), [[1, 2, 3]]).shape
    (1, 3, 260)
  """
  tokens = jnp.asarray(tokens, jnp.int32)
  if adapters is None:
    return _forward(base, tokens, None, None, None)
  adapters.check(base.config)
  gates = check_gates(gates, tokens.shape, len(adapters.names))
  loras = adapters.layers
  if base.stacked:
    stacked = adapters.stack(base.config.layers)
    loras = jax.tree.map(lambda x: x.swapaxes(0, 1), stacked)
  return _forward(base, tokens, loras, gates, get_rule(rule))


def check_gates(gates, shape: tuple[int, int], experts: int) -> jax.Array:
  """Returns gates as float32[B, E] or [B, T, E], or raises `ValueError`."""
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
def _forward(base, tokens, loras, gates, rule):
  batch, length = tokens.shape
  positions = jnp.broadcast_to(jnp.arange(length), (batch, length))
  adapt = None if rule is None else mixture(rule, gates)
  mask = causal_mask(jnp.ones_like(tokens))
  hidden, _ = base(tokens, positions, mask, loras=loras, adapt=adapt)
  return base.logits(hidden)
