"""Bayes: weighs experts by the likelihood that each assigns to the text.

Axis letters: B batch, E experts.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tokenlora_jax.config import InputError, check, check_choice
from tokenlora_jax.mixing.router import Router
from tokenlora_jax.mixing.routers.registry import make_router, register_router


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PosteriorRouter(Router):
  """gates_e = prior_e prod_t p_e(x_t | x_<t) / sum over experts of the same.

  The posterior over experts (DEMix, Gururangan et al., 2022, eq. 4;
  Branch-Train-Merge, Li et al., 2022). Each expert reads the text alone, as a
  row of the batch. With the rule `probabilities` and a refresh at every token,
  P(x) = sum_e prior_e p_e(x). So for any text the mixture's loss exceeds that
  of expert e by at most log(1 / prior_e) nats: log E under a uniform prior.

  With `share` a > 0 the lead can change: after each token the belief becomes
  (1 - a) w_e + a / E (Herbster and Warmuth, 1998, fixed share).

  Attributes:
    prior: the router whose gates at the prompt are the first belief.
    share: float32[], a.
    evidence: the tokens that update the belief: `all`, the prompt's included,
      or `answer`, only those after it.
  """

  needs = "evidence"

  prior: Router = dataclasses.field()
  share: Float[Array, ""]
  evidence: Literal["answer", "all"] = dataclasses.field(
    metadata={"static": True}
  )

  @property
  def experts(self):
    return self.prior.experts

  def bind(self, names):
    return dataclasses.replace(self, prior=_weighs(self.prior.bind(names)))

  def gates(self, batch, observation, seen):
    return jax.nn.softmax(seen, axis=-1)

  @property
  def counts_prompt(self):
    return self.evidence == "all"

  def learn(self, belief, log_probs):
    belief = jax.nn.log_softmax(belief + log_probs, axis=-1)
    shared = jnp.log(self.share / belief.shape[-1])
    return jnp.logaddexp(jnp.log1p(-self.share) + belief, shared)


@register_router("posterior")
def posterior(
  prior: str | Router = "uniform",
  evidence: str = "answer",
  share: float = 0.0,
) -> PosteriorRouter:
  """Makes the router of the posterior over experts.

  Args:
    prior: the router whose gates at the prompt are the first belief, or its
      name.
    evidence: the tokens that update the belief: `answer`, those after the
      prompt; or `all`, the prompt's too. Use `answer` for adapters trained on
      answers alone, which do not model prompts.
    share: share of the belief that is spread evenly after each token.

  Raises:
    InputError: a setting is not allowed.

  Example:
    >>> router = posterior(make_router("fixed", gates=[0.5, 0.5]))
    >>> belief = router.learn(jnp.zeros((1, 2)), jnp.log(jnp.array([[0.9, 0.1]])))
    >>> router.gates(1, (), belief).round(3).tolist()
    [[0.9, 0.1]]
  """
  check_choice("router.evidence", evidence, ("answer", "all"))
  check(0 <= share < 1, "router.share", share, "0 <= share < 1")
  prior = make_router(prior) if isinstance(prior, str) else prior
  check(
    prior.needs != "evidence" and not prior.prototypes,
    "router.prior", type(prior).__name__,
    "a router that decides at the prompt",
  )  # fmt: skip
  return PosteriorRouter(_weighs(prior), jnp.float32(share), evidence)


def _weighs(prior: Router) -> Router:
  """Returns a prior whose gates are at least 0, or raises `InputError`."""
  if prior.may_be_zero or prior.may_be_negative:
    raise InputError(
      "router.prior: is not allowed where all gates may be 0 or one negative"
      " (base, a threshold, fixed gates below 0); want gates that are shares,"
      " such as uniform"
    )
  return prior
