"""Measures the distance of PEFT's combinations from the weighted sum.

  python -m benchmarks.rules --bank runs/smollm2_135m/bank

Compares the update dW of each adapted projection under a rule with that of
`exact`: the relative error ||dW - dW_exact|| / ||dW_exact||
(Frobenius norms, over all maps and layers together), for even gates, for each
expert alone and for a leading expert with .7.
"""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import make_parser
from tokenlora_jax import Adapters, load_bank
from tokenlora_jax.commands import cli
from tokenlora_jax.mixing.rules import get_rule
from tokenlora_jax.model.lora import Lora

RULES = ("peft_linear", "peft040")


def update(lora: Lora, gates: jax.Array, rule: str) -> jax.Array:
  """Returns the update dW of one projection under a rule.

  Args:
    lora: its adapters.
    gates: float32[E].
    rule: by name.

  Returns:
    float32[in, out]; row i is what input i alone adds.

  Example:
    >>> lora = Lora(jnp.ones((2, 1, 3)), jnp.ones((2, 1, 3)), jnp.ones(2))
    >>> update(lora, jnp.array([0.5, 0.25]), "exact")[0].tolist()
    [0.75, 0.75, 0.75]
  """
  low = jnp.moveaxis(lora.a, -1, 0)
  mixed = get_rule(rule).mix(low, gates[:, None], lora.scaling[:, None])
  return jnp.einsum("ier,ero->io", mixed, lora.b)


def relative_error(adapters: Adapters, gates: np.ndarray, rule: str) -> float:
  """Returns ||dW - dW_exact|| / ||dW_exact|| over all maps of all layers."""
  off = whole = 0.0
  for layer in adapters.layers:
    for lora in layer.values():
      true = update(lora, jnp.asarray(gates), "exact")
      found = update(lora, jnp.asarray(gates), rule)
      off += float(jnp.sum((found - true) ** 2))
      whole += float(jnp.sum(true**2))
  return (off / whole) ** 0.5


def some_gates(names: tuple[str, ...]) -> Mapping[str, np.ndarray]:
  """Returns the gates [E] to compare, by label."""
  count = len(names)
  one = np.eye(count, dtype=np.float32)
  even = np.full(count, 1 / count, np.float32)
  rest = 0.3 / max(1, count - 1)
  leading = {
    f"{name} .7": rest + (0.7 - rest) * row
    for name, row in zip(names, one, strict=True)
  }
  alone = {f"{name} alone": row for name, row in zip(names, one, strict=True)}
  return {"even": even} | leading | alone


def main(argv: Sequence[str]) -> None:
  """Prints the table."""
  parser = make_parser("benchmarks.rules", __doc__)
  parser.add_argument("--bank", required=True)
  adapters = load_bank(parser.parse_args(argv).bank).adapters
  print(f"| gates | {' | '.join(RULES)} |\n|---|{'---|' * len(RULES)}")
  for name, gates in some_gates(adapters.names).items():
    errors = [relative_error(adapters, gates, rule) for rule in RULES]
    print(f"| {name} | {' | '.join(f'{error:.3f}' for error in errors)} |")


if __name__ == "__main__":
  cli.run(main)
