"""Typed, frozen settings of training, and the `Config` that holds all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import dataclasses
import json
from typing import Literal

from tokenlora_jax.config.decoding import DecodeConfig, RouterConfig
from tokenlora_jax.config.errors import check, check_choice, check_literals

# The seven linear maps of a Llama layer, by our names, in the order they run.
PROJECTIONS = ("q", "k", "v", "o", "gate", "up", "down")


@dataclasses.dataclass(frozen=True)
class BaseConfig:
  """The frozen language model.

  Attributes:
    path: a Hugging Face folder, a .gguf file, a hub id, `package:NAME` (the
      .gguf or folder that an installed Python package carries), or
      `random:PRESET`.
    dtype: what its weights are kept and multiplied in.
    quantize: what its layers' kernels are kept in instead, for training as for
      decoding: `int8` (half the bytes of bfloat16), `nf4` (4-bit floats for
      normal weights, more than a quarter) or `none`.
  """

  path: str = "random:tiny"
  dtype: Literal["float32", "bfloat16"] = "bfloat16"
  quantize: Literal["none", "int8", "nf4"] = "none"

  def __post_init__(self):
    check_literals(self, "base.")


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
    check_literals(self, "data.")
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
    check_literals(self, "optim.")
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
    compilation_cache: the folder that keeps compiled programs, so that the next
      command that needs them starts in seconds; `user` is tokenlora_jax/xla in
      the user's cache folder, "" keeps none.
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
  compilation_cache: str = "user"

  def __post_init__(self):
    check_literals(self, "")
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
