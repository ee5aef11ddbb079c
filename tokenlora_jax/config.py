"""Typed, frozen settings, and the one-line errors that bad input gets.

Everything here is plain data: no JAX, no files. An experiment is one `Config`
instance in a file of `configs/`; the command line overrides single fields.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
import dataclasses
import difflib
import json
from typing import Literal, get_args, get_origin, get_type_hints

# The seven linear maps of a Llama layer, by our names, in the order they run.
PROJECTIONS = ("q", "k", "v", "o", "gate", "up", "down")


class InputError(ValueError):
  """Bad input from a person: one line that says what, where and what to do."""


def nearest(value: str, allowed: Iterable[str]) -> str:
  """Returns " (did you mean 'x'?)" for the nearest name, or "".

  Args:
    value: what was given.
    allowed: the names that exist.

  Example:
    >>> nearest("centriod", ["centroid", "uniform"])
    " (did you mean 'centroid'?)"
  """
  match = difflib.get_close_matches(str(value), list(allowed), n=1, cutoff=0.5)
  return f" (did you mean {match[0]!r}?)" if match else ""


def first_line(error: Exception) -> str:
  """Returns the first line of what an error says, or else its type's name.

  Example:
    >>> first_line(ValueError("no such row\\n  at line 3")), first_line(OSError())
    ('no such row', 'OSError')
  """
  return (str(error).strip() or type(error).__name__).splitlines()[0]


def check_choice(field: str, value: str, allowed: Sequence[str]) -> None:
  """Raises `InputError` unless `value` is one of `allowed`.

  Args:
    field: the name of the setting, as a person would write it.
    value: what was given.
    allowed: the names that exist.

  Raises:
    InputError: naming field, value, the allowed names and the nearest one.

  Example:
    >>> check_choice("router.name", "uniform", ["centroid", "uniform"])
  """
  if value not in allowed:
    raise InputError(
      f"{field}: {value!r} is not one of {', '.join(allowed)}"
      f"{nearest(value, allowed)}"
    )


def check(condition: bool, field: str, value: object, allowed: str) -> None:
  """Raises `InputError` naming field, value and what is allowed, unless true.

  Example:
    >>> check(3 > 0, "data.rows", 3, "at least 1")
  """
  if not condition:
    raise InputError(f"{field}: {value!r} is not allowed; want {allowed}")


def _check_literals(settings: object, section: str) -> None:
  """Checks every field that allows only some words."""
  for field, hint in get_type_hints(type(settings)).items():
    if get_origin(hint) is Literal:
      name = f"{section}{field.replace('_', '-')}"
      check_choice(name, getattr(settings, field), get_args(hint))


@dataclasses.dataclass(frozen=True)
class BaseConfig:
  """The frozen language model.

  Attributes:
    path: a Hugging Face folder, a .gguf file, a hub id, `package:NAME` (the
      .gguf or folder that an installed Python package carries), or
      `random:PRESET`.
    dtype: what its weights are kept and multiplied in.
    quantize: what its layers' kernels are kept in instead, for training as for
      decoding: `int8` (half the bytes of bfloat16), `nf4` (QLoRA's 4-bit
      NormalFloat, about a quarter) or `none`.
  """

  path: str = "random:tiny"
  dtype: Literal["float32", "bfloat16"] = "bfloat16"
  quantize: Literal["none", "int8", "nf4"] = "none"

  def __post_init__(self):
    _check_literals(self, "base.")


@dataclasses.dataclass(frozen=True)
class LoraConfig:
  """The adapters, alike for every expert of a run.

  Attributes:
    rank: R.
    alpha: scaling is alpha / R (alpha / sqrt(R) with `rslora`).
    rslora: rank-stabilised scaling (Kalajdzievski, 2023).
    dropout: share of the adapter's inputs zeroed in training.
    targets: the linear maps that get an adapter, of
      q, k, v, o, gate, up, down.
  """

  rank: int = 16
  alpha: float = 16.0
  rslora: bool = False
  dropout: float = 0.0
  targets: tuple[str, ...] = ("q", "v")

  def __post_init__(self):
    check(self.rank >= 1, "lora.rank", self.rank, "at least 1")
    check(0 <= self.dropout < 1, "lora.dropout", self.dropout, "0 <= p < 1")
    check(len(self.targets) >= 1, "lora.targets", self.targets, "at least one")
    for target in self.targets:
      check_choice("lora.targets", target, PROJECTIONS)

  @property
  def scaling(self) -> float:
    """alpha / R, or alpha / sqrt(R) for rank-stabilised LoRA."""
    return self.alpha / (self.rank**0.5 if self.rslora else self.rank)


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """Where rows come from and what a batch is.

  Attributes:
    source: `builtin` (our own seeded generators), `local` (the original files
      under `dir`), `hub` (Hugging Face datasets) or `tfds`.
    dir: the folder of `local`, or the data_dir of `tfds`.
    tasks: one expert each, in this order: gsm8k, arc_challenge, codealpaca,
      squad.
    loss_on: `answer` (the answer and the end token) or `all` (as the paper).
    rows: B, rows an expert a step.
    length: T, the most tokens a row may have.
    packing: put several short rows of a task into one row of the batch, where
      they neither see nor predict each other: fewer steps a pass, of more rows.
    too_long: what happens to a row of more tokens: `skip`, `truncate` (its
      end is cut) or `fatal`.
    bad_rows: what happens to a row that breaks its schema: `fatal` or `skip`.
    train_rows: how many training rows a task uses at most; 0 is all.
    eval_rows: how many held-out rows a task uses at most: its first that fit.
    seed: of the order of rows, and of the built-in rows.
  """

  source: Literal["builtin", "local", "hub", "tfds"] = "builtin"
  dir: str = ""
  tasks: tuple[str, ...] = ("gsm8k", "arc_challenge", "codealpaca", "squad")
  loss_on: Literal["answer", "all"] = "answer"
  rows: int = 8
  length: int = 256
  packing: bool = False
  too_long: Literal["skip", "truncate", "fatal"] = "skip"
  bad_rows: Literal["fatal", "skip"] = "fatal"
  train_rows: int = 0
  eval_rows: int = 64
  seed: int = 0

  def __post_init__(self):
    _check_literals(self, "data.")
    check(self.rows >= 1, "data.rows", self.rows, "at least 1")
    check(self.length >= 8, "data.length", self.length, "at least 8 tokens")
    check(
      self.train_rows >= 0,
      "data.train-rows",
      self.train_rows,
      "0 (all) or more",
    )
    check(self.eval_rows >= 1, "data.eval-rows", self.eval_rows, "at least 1")
    check(len(self.tasks) >= 1, "data.tasks", self.tasks, "at least one task")
    check(
      len(set(self.tasks)) == len(self.tasks),
      "data.tasks", self.tasks, "each task once",
    )  # fmt: skip
    check(
      self.source != "local" or bool(self.dir),
      "data.dir", self.dir, "the folder that holds the task folders",
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class OptimConfig:
  """AdamW on the adapters, each expert for itself.

  Attributes:
    steps: optimizer steps of the whole run.
    learning_rate: at the end of the warm-up.
    warmup_steps: linear from 0.
    schedule: after the warm-up: `cosine` (to zero) or `constant`.
    weight_decay: decoupled, on the adapters.
    clip: largest global norm of an expert's gradient; 0 is no clipping.
  """

  steps: int = 100
  learning_rate: float = 5e-4
  warmup_steps: int = 10
  schedule: Literal["cosine", "constant"] = "cosine"
  weight_decay: float = 0.0
  clip: float = 1.0

  def __post_init__(self):
    _check_literals(self, "optim.")
    check(self.steps >= 1, "optim.steps", self.steps, "at least 1")
    check(
      self.learning_rate > 0,
      "optim.learning-rate", self.learning_rate, "more than 0",
    )  # fmt: skip
    check(
      0 <= self.warmup_steps <= self.steps,
      "optim.warmup-steps", self.warmup_steps, f"0 to steps ({self.steps})",
    )  # fmt: skip
    check(self.clip >= 0, "optim.clip", self.clip, "0 (off) or more")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """How many devices each axis of the mesh takes, and in which processes.

  The hosts of a TPU pod find each other. Elsewhere each process is given the
  same `coordinator` and `processes`, and its own number as `process`.

  Attributes:
    expert: devices over which experts are split; they never communicate.
    data: devices over which rows are split.
    fsdp: devices over which rows and the frozen weights are split.
      0 takes the devices that the other axes leave.
    tensor: devices over which heads and the MLP are split.
    coordinator: HOST:PORT on which process 0 waits for the others.
    processes: how many processes there are.
    process: which of them this one is, from 0.
  """

  expert: int = 1
  data: int = 1
  fsdp: int = 0
  tensor: int = 1
  coordinator: str = ""
  processes: int = 1
  process: int = 0

  def __post_init__(self):
    for field in ("expert", "data", "tensor", "processes"):
      value = getattr(self, field)
      check(value >= 1, f"mesh.{field}", value, "at least 1")
    check(self.fsdp >= 0, "mesh.fsdp", self.fsdp, "0 (what is left) or more")
    check(
      0 <= self.process < self.processes,
      "mesh.process", self.process,
      f"0 to {self.processes - 1}, since mesh.processes is {self.processes}",
    )  # fmt: skip
    host, _, port = self.coordinator.rpartition(":")
    check(
      (bool(host) and port.isdecimal() and 0 < int(port) < 2**16)
      if self.processes > 1
      else not self.coordinator,
      "mesh.coordinator", self.coordinator,
      "HOST:PORT of process 0" if self.processes > 1
      else "none, since mesh.processes is 1",
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class RouterConfig:
  """Who decides the gates.

  Attributes:
    name: `centroid`, `uniform`, `sum`, `one-hot`, `fixed` or `base`.
    encoder: of `centroid`: `minilm` (all-MiniLM-L6-v2, the paper's) or `hidden`
      (the base's own mean-pooled last hidden state, inside the graph).
    minilm: where all-MiniLM-L6-v2 is: a folder, a hub id or `package:NAME`.
    sharpen: of `centroid`: what the largest similarity is multiplied by before
      the softmax (4 in the paper).
    expert: of `one-hot`: the expert's name.
    gates: of `fixed`: one number an expert.
    centroid_rows: training texts a task averaged into a centroid.
  """

  name: str = "centroid"
  encoder: Literal["minilm", "hidden"] = "minilm"
  minilm: str = "sentence-transformers/all-MiniLM-L6-v2"
  sharpen: float = 4.0
  expert: str = ""
  gates: tuple[float, ...] = ()
  centroid_rows: int = 256

  def __post_init__(self):
    _check_literals(self, "router.")
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
    temperature: 0 is greedy.
    top_k: keep the k most likely tokens; 0 is all.
    top_p: keep the most likely tokens whose probabilities reach this sum.
    seed: of the sampling.
    stop_at_eos: whether the end token ends a sequence.
    stop: strings that end a sequence (they are cut from the text).
  """

  max_new_tokens: int = 64
  refresh_every: int = 2
  temperature: float = 0.0
  top_k: int = 0
  top_p: float = 1.0
  seed: int = 0
  stop_at_eos: bool = True
  stop: tuple[str, ...] = ()

  def __post_init__(self):
    check(
      self.max_new_tokens >= 1,
      "decode.max-new-tokens", self.max_new_tokens, "at least 1",
    )  # fmt: skip
    check(
      self.refresh_every >= 0,
      "decode.refresh-every", self.refresh_every, "0 (once) or more",
    )  # fmt: skip
    check(
      self.temperature >= 0, "decode.temperature", self.temperature, "0 or more"
    )
    check(self.top_k >= 0, "decode.top-k", self.top_k, "0 (all) or more")
    check(0 < self.top_p <= 1, "decode.top-p", self.top_p, "0 < p <= 1")


@dataclasses.dataclass(frozen=True)
class Config:
  """One experiment.

  Attributes:
    workdir: where checkpoints, logs and the bank of this run go.
    base: the frozen model.
    lora: the adapters.
    data: the rows.
    optim: the optimizer.
    mesh: the devices.
    router: who decides the gates.
    decode: how text is made.
    seed: of the adapters' first weights and of dropout.
    remat: what of a layer the backward pass recomputes: `none`, `elementwise`
      (all but the matrix products with weights: little work, a third of the
      memory) or `full` (half as much work again, the least memory).
    accumulate: parts in which a step's rows run, one after the other: as many
      times less memory for activations, and the same result.
    eval_every: steps between two held-out losses; 0 is only at the end.
    save_every: steps between two checkpoints.
    keep: how many checkpoints stay.
    resume: go on with the run in `workdir`, if there is one.
  """

  workdir: str = "runs/default"
  base: BaseConfig = BaseConfig()
  lora: LoraConfig = LoraConfig()
  data: DataConfig = DataConfig()
  optim: OptimConfig = OptimConfig()
  mesh: MeshConfig = MeshConfig()
  router: RouterConfig = RouterConfig()
  decode: DecodeConfig = DecodeConfig()
  seed: int = 0
  remat: Literal["none", "elementwise", "full"] = "elementwise"
  accumulate: int = 1
  eval_every: int = 0
  save_every: int = 50
  keep: int = 2
  resume: bool = True

  def __post_init__(self):
    _check_literals(self, "")
    check(
      self.accumulate >= 1 and self.data.rows % self.accumulate == 0,
      "accumulate", self.accumulate, f"a divisor of data.rows {self.data.rows}",
    )  # fmt: skip
    check(self.eval_every >= 0, "eval-every", self.eval_every, "0 or more")
    check(self.save_every >= 1, "save-every", self.save_every, "at least 1")
    check(self.keep >= 1, "keep", self.keep, "at least 1")
    check(
      len(self.data.tasks) % self.mesh.expert == 0,
      "mesh.expert", self.mesh.expert,
      f"a divisor of the {len(self.data.tasks)} experts",
    )  # fmt: skip

  @classmethod
  def of(cls, args: Config) -> Config:
    """Returns the settings alone of a config with more arguments."""
    return cls(
      **{f.name: getattr(args, f.name) for f in dataclasses.fields(cls)}
    )

  def to_json(self) -> dict:
    """Returns the settings as nested dicts of JSON values."""
    return json.loads(json.dumps(dataclasses.asdict(self)))


def differences(
  old: Mapping, new: Mapping, ignored: Sequence[str] = ()
) -> list[str]:
  """Returns the settings in which two configs differ, a line each.

  Args:
    old: nested dicts of settings.
    new: the same.
    ignored: top-level settings that may differ.

  Example:
    >>> differences({"a": {"b": 1}, "c": 2}, {"a": {"b": 3}, "c": 4}, ["c"])
    ['a.b 1 (now 3)']
  """
  lines = []
  for name in sorted(old.keys() | new.keys()):
    if name in ignored:
      continue
    was, now = old.get(name), new.get(name)
    if isinstance(was, Mapping) and isinstance(now, Mapping):
      lines += [f"{name}.{line}" for line in differences(was, now)]
    elif was != now:
      lines.append(f"{name} {was!r} (now {now!r})")
  return lines
