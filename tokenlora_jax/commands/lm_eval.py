"""A base and its bank as a model of EleutherAI's lm-evaluation-harness.

Importing this module registers the model `tokenlora_jax` with lm-eval; lm-eval
0.4 has no plug-ins, so `python -m tokenlora_jax.lm_eval` imports it and then
runs lm-eval's command. Texts are tokenized as by lm-eval's own `hf` model, so
the base alone gets the scores that `hf` gives it.
"""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
import itertools
import json
import logging
from typing import Any

import jax
import jinja2
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import (
  get_rolling_token_windows,
  make_disjoint_window,
  simple_parse_args_string,
)
from tqdm import tqdm

from tokenlora_jax.bank.bank import load_bank
from tokenlora_jax.commands.lm_eval_args import (
  parse_gen_kwargs,
  parse_model_args,
)
from tokenlora_jax.config import DecodeConfig, InputError, check
from tokenlora_jax.decoding import generate
from tokenlora_jax.evaluation.likelihood import Scorer
from tokenlora_jax.formats.load import Base

_log = logging.getLogger(__name__)

# (context and continuation as text, or None for a window; tokens of each).
Request = tuple[tuple[str, str] | None, list[int], list[int]]


@register_model("tokenlora_jax")
class TokenLoraLM(TemplateLM):
  """A base, alone or with a bank whose gates a router refreshes.

  Args:
    **model_args: the values of `--model_args`; see `ModelArgs`.

  Raises:
    InputError: a setting does not exist or is not allowed, or the base or bank
      cannot be loaded.

  Example:
    >>> model = TokenLoraLM(base="random:tiny", dtype="float32")
    >>> model.tok_encode("hi"), model.max_length
    ([1, 108, 109], 1024)
  """

  def __init__(self, **model_args: Any):
    super().__init__()
    self._args = args = parse_model_args(model_args)
    found = Base.open(args.base.path)
    self.tokenizer = found.tokenizer()
    if self.prefix_token_id is None:
      raise InputError(
        f"{args.base.path}: its tokenizer has neither BOS nor EOS"
      )
    if args.add_bos_token is not None:
      check(
        self.tokenizer.bos_token is not None or not args.add_bos_token,
        "model_args add_bos_token", True, "false: the tokenizer has no BOS",
      )  # fmt: skip
      self.tokenizer.add_bos_token = args.add_bos_token
    self._base = found.weights(args.base.dtype, quantize=args.base.quantize)
    longest = self._base.config.max_length
    self.max_length = args.max_length or longest
    check(
      1 < self.max_length <= longest,
      "model_args max_length", self.max_length, f"2 to the base's {longest}",
    )  # fmt: skip
    self._adapters = self._router = None
    if args.bank:
      bank = load_bank(args.bank, self._base, same_base=args.same_base)
      self._adapters, self._router = (
        bank.adapters,
        bank.router(args.router, frozenset(args.given)),
      )
    # A router that needs no input gives the same gates every time.
    looks = self._router is not None and self._router.needs != "nothing"
    self._refresh_every = args.refresh_every if looks else 0
    # A seed per batch, so that equal requests get different samples.
    self._seeds = itertools.count(args.seed)

  @classmethod
  def create_from_arg_string(
    cls, arg_string: str, additional_config: dict | None = None
  ) -> TokenLoraLM:
    """Makes the model from `key=value,key=value`; lm-eval calls this."""
    given = simple_parse_args_string(arg_string)
    return cls.create_from_arg_obj(given, additional_config)

  @classmethod
  def create_from_arg_obj(
    cls, arg_dict: dict[str, Any], additional_config: dict | None = None
  ) -> TokenLoraLM:
    """Makes the model from settings; lm-eval calls this.

    lm-eval's command always adds `--batch_size`, over which a `batch_size` of
    the settings wins, and a torch device, which is ignored.
    """
    batch_size = (additional_config or {}).get("batch_size")
    return cls(**{"batch_size": batch_size} | arg_dict)

  @property
  def eot_token_id(self) -> int | None:
    """The id of the end token."""
    return self.tokenizer.eos_token_id

  @property
  def prefix_token_id(self) -> int | None:
    """The id of the token before a text without context: BOS, or else EOS."""
    bos = self.tokenizer.bos_token_id
    return self.eot_token_id if bos is None else bos

  @property
  def tokenizer_name(self) -> str:
    """The key of this tokenizer in lm-eval's request cache."""
    return self._args.base.path.replace("/", "__")

  def get_model_info(self) -> dict[str, Any]:
    """Returns the model's settings, which lm-eval writes with its results."""
    info = dataclasses.asdict(self._args) | {
      "fingerprint": self._base.fingerprint,
      "max_length": self.max_length,
      "device": jax.devices()[0].device_kind,
    }
    del info["given"]  # Of the router's settings, which are all there.
    if self._adapters is None:
      for name in ("router", "refresh_every", "rule"):
        del info[name]
    else:
      info["experts"] = list(self._adapters.names)
    return {f"model_{name}": value for name, value in info.items()}

  def tok_encode(
    self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
  ) -> list[int]:
    """Returns a text's tokens.

    Args:
      string: the text.
      add_special_tokens: whether the tokenizer may add BOS; by default the
        model's `add_bos_token`, but never a second BOS.
      **kwargs: ignored; lm-eval passes them for other models.
    """
    if add_special_tokens is None:
      has_one = string.startswith(self.tokenizer.decode(self.prefix_token_id))
      add_special_tokens = not has_one
    return self.tokenizer.encode(string, add_special_tokens=add_special_tokens)

  def apply_chat_template(
    self,
    chat_history: list[dict[str, str]],
    add_generation_prompt: bool = True,
  ) -> str:
    """Formats a conversation with the base's chat template.

    Args:
      chat_history: {"role": ..., "content": ...} of each message.
      add_generation_prompt: whether to open the assistant's turn; otherwise the
        last message is left open.

    Raises:
      InputError: the tokenizer has no chat template.
    """

    def apply(messages):
      return self.tokenizer.apply_chat_template(
        messages,
        tokenize=False,
        add_generation_prompt=add_generation_prompt,
        continue_final_message=not add_generation_prompt,
      )

    if self.tokenizer.chat_template is None:
      raise InputError(f"{self._args.base.path}: has no chat template")
    try:
      return apply(chat_history)
    except jinja2.TemplateError:
      _log.warning("the chat template takes no system message; left out")
      return apply([m for m in chat_history if m["role"] != "system"])

  # ---------------------------------------------------------------------------
  # Log-probabilities.

  def loglikelihood_rolling(
    self, requests: Sequence[Instance], disable_tqdm: bool = False
  ) -> list[float]:
    """Returns the log-probability of each whole text, in nats.

    A text longer than `max_length` is read in windows, and each token is
    predicted once; the first token follows BOS, or else EOS.
    """
    windows, counts = [], []
    for request in requests:
      parts = get_rolling_token_windows(
        self.tok_encode(request.args[0]),
        prefix_token=self.prefix_token_id,
        max_seq_len=self.max_length,
        context_len=1,
      )
      parts = [(None, *make_disjoint_window(part)) for part in parts]
      windows += parts
      counts.append(len(parts))
    scores = iter(self._loglikelihood_tokens(windows, disable_tqdm))
    totals = []
    for request, count in zip(requests, counts, strict=True):
      part = itertools.islice(scores, count)
      totals.append(float(sum(log_prob for log_prob, _ in part)))
      self.cache_hook.add_partial(
        "loglikelihood_rolling", request.args, totals[-1]
      )
    return totals

  def _loglikelihood_tokens(
    self, requests: Sequence[Request], disable_tqdm: bool = False, **kwargs: Any
  ) -> list[tuple[float, bool]]:
    """Returns (log-probability, whether it is greedy) of each continuation."""
    pairs = [self._fitting(*request[1:]) for request in requests]
    scorer = Scorer(
      self._base, self.tokenizer, self._adapters, self._router,
      self._refresh_every, self._args.rule, self._args.batch_size,
    )  # fmt: skip
    found: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
    for place, *score in tqdm(
      scorer(pairs),
      desc="Running loglikelihood requests",
      total=len(requests),
      disable=disable_tqdm,
    ):
      found[place] = tuple(score)
      texts = requests[place][0]
      if texts is not None:
        self.cache_hook.add_partial("loglikelihood", texts, found[place])
    return found

  def _fitting(
    self, context: list[int], continuation: list[int]
  ) -> tuple[list[int], list[int]]:
    """Returns context and continuation, the context cut to fit `max_length`."""
    count = len(continuation)
    check(
      0 < count <= self.max_length,
      "continuation", f"{count} tokens", f"1 to max_length {self.max_length}",
    )  # fmt: skip
    context = context or [self.prefix_token_id]
    # The last token is predicted and not read.
    room = self.max_length + 1 - count
    if len(context) > room:
      self._warn_of_cut(len(context), room)
    return context[-room:], continuation

  def _warn_of_cut(self, length: int, room: int) -> None:
    _log.warning(
      "a context of %d tokens: only its last %d fit in max_length %d",
      length, room, self.max_length,
    )  # fmt: skip

  # ---------------------------------------------------------------------------
  # Text.

  def generate_until(
    self, requests: Sequence[Instance], disable_tqdm: bool = False
  ) -> list[str]:
    """Generates a text for each request, without its stop string.

    A request's settings are those of `parse_gen_kwargs`.

    Raises:
      InputError: a setting is not allowed.
    """
    alike: dict[str, list[int]] = {}
    for place, request in enumerate(requests):
      settings = json.dumps(request.args[1], sort_keys=True)
      alike.setdefault(settings, []).append(place)
    texts = [""] * len(requests)
    with tqdm(
      total=len(requests),
      desc="Running generate_until requests",
      disable=disable_tqdm,
    ) as bar:
      for settings, places in alike.items():
        config = self._decode_config(json.loads(settings))
        prompts = {p: self._prompt(requests[p], config) for p in places}
        places.sort(key=lambda p: -len(prompts[p]))
        size = min(self._args.batch_size, len(places))
        for start in range(0, len(places), size):
          batch = places[start : start + size]
          # Pad the last batch, so that it does not compile again.
          filled = batch + batch[-1:] * (size - len(batch))
          made = self._make([prompts[p] for p in filled], config)
          for place, text in zip(batch, made, strict=False):
            texts[place] = text
            self.cache_hook.add_partial(
              "generate_until", requests[place].args, text
            )
          bar.update(len(batch))
    return texts

  def _decode_config(self, settings: dict[str, Any]) -> DecodeConfig:
    """Returns the decode settings of a request."""
    config = parse_gen_kwargs(settings, self._refresh_every)
    check(
      config.max_new_tokens < self.max_length,
      "gen_kwargs max_gen_toks", config.max_new_tokens,
      f"fewer than max_length {self.max_length}",
    )  # fmt: skip
    return config

  def _prompt(self, request: Instance, config: DecodeConfig) -> list[int]:
    tokens = self.tok_encode(request.args[0]) or [self.prefix_token_id]
    room = self.max_length - config.max_new_tokens
    if len(tokens) > room:
      self._warn_of_cut(len(tokens), room)
    return tokens[-room:]

  def _make(self, prompts: list[list[int]], config: DecodeConfig) -> list[str]:
    """Returns one generated text per prompt."""
    made = generate(
      self._base, prompts, self._adapters, self._router,
      dataclasses.replace(
        config, seed=next(self._seeds), rule=self._args.rule
      ),
      self.tokenizer,
    )  # fmt: skip
    return made.texts
