"""Frozen settings of a run: `Config` and its sections."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import dataclasses
import json
from typing import Literal

from tokenlora_jax.config.decoding import DecodeConfig, RouterConfig
from tokenlora_jax.config.errors import check, check_choice, check_literals

# The seven linear maps of a Llama layer under our names, in execution order.
PROJECTIONS = ("q", "k", "v", "o", "gate", "up", "down")


@dataclasses.dataclass(frozen=True)
class BaseConfig:
  """Settings of the frozen base model.

  Attributes:
    path: a Hugging Face folder, a .gguf file, a hub id, `package:NAME` (the
      .gguf or folder inside an installed Python package), or `random:PRESET`.
    dtype: dtype of the weights and of the products with them.
    quantize: quantisation of the layers' frozen kernels, in training and in
      decoding: `int8` (half the bytes of bfloat16), `nf4` (4-bit floats for
      normal weights, a little over a quarter) or `none`.
  """

  path: str = "random:tiny"
  dtype: Literal["float32", "bfloat16"] = "bfloat16"
  quantize: Literal["none", "int8", "nf4"] = "none"

  def __post_init__(self):
    check_literals(self, "base.")


@dataclasses.dataclass(frozen=True)
class LoraConfig:
  """Settings of the LoRA adapters, the same for every expert of a run.

  Attributes:
    rank: R, the rank of each adapter.
    alpha: the scaling is alpha / R (alpha / sqrt(R) with `rslora`).
    rslora: rank-stabilised scaling (Kalajdzievski, 2023).
    dropout: share of the adapter's inputs set to zero in training.
    targets: the linear maps that get an adapter, of
      q, k, v, o, gate, up, down.

  Example:
    >>> LoraConfig(rank=8, alpha=16.0).scaling
    2.0
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
    """The factor alpha / R, or alpha / sqrt(R) for rank-stabilised LoRA."""
    return self.alpha / (self.rank**0.5 if self.rslora else self.rank)


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """Settings of the data: source, tasks and batches.

  Attributes:
    source: `builtin` (our own seeded generators), `local` (the original files
      under `dir`), `hub` (Hugging Face datasets) or `tfds`.
    dir: the folder of `local`, or the data_dir of `tfds`.
    tasks: one expert is trained on each, in this order: gsm8k, arc_challenge,
      codealpaca, squad.
    loss_on: tokens in the loss: `answer` (the answer and the end token) or
      `all` (as in the paper).
    rows: B, rows per expert and step.
    length: T, the most tokens a row may have.
    packing: pack several short rows of a task into one row of the batch. They
      do not attend to each other, and an epoch takes fewer steps.
    too_long: a row longer than `length`: `skip` it, `truncate` its end, or
      stop (`fatal`).
    bad_rows: a row that breaks its schema: stop (`fatal`) or `skip` it.
    train_rows: the most training rows per task; 0 is all.
    eval_rows: the most held-out rows per task: the first that fit.
    seed: seeds the order of the rows, and the built-in rows.
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
  """Settings of the optimizer: AdamW, separately for each expert.

  Attributes:
    steps: optimizer steps of the whole run.
    learning_rate: the peak, reached at the end of the warm-up.
    warmup_steps: steps over which the learning rate rises linearly from 0.
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
  """Settings of the device mesh and of its processes.

  The hosts of a TPU pod find each other. Elsewhere give each process the same
  `coordinator` and `processes`, and its own number as `process`.

  Attributes:
    expert: devices over which experts are sharded; they never communicate.
    data: devices over which rows are sharded.
    fsdp: devices over which rows and the frozen weights are sharded;
      0 takes the devices that the other axes leave.
    tensor: devices over which heads and the MLP are sharded.
    coordinator: HOST:PORT on which process 0 waits for the others.
    processes: number of processes.
    process: number of this process, from 0.
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
  """Settings of one experiment.

  Attributes:
    workdir: the folder for this run's checkpoints, logs and bank.
    base: the frozen model.
    lora: the adapters.
    data: the rows.
    optim: the optimizer.
    mesh: the devices.
    router: the router, which computes the gates.
    decode: decoding.
    seed: seeds the adapters' initial weights and dropout.
    remat: activations of a layer that the backward pass recomputes: `none`,
      `elementwise` (all but the matrix products with weights: little work, a
      third of the memory) or `full` (half as much work again, the least
      memory).
    accumulate: number of parts into which the rows of a step are split, run one
      after the other: divides the memory for activations, same result.
    eval_every: steps between two held-out losses; 0 is only at the end.
    save_every: steps between two checkpoints.
    keep: number of checkpoints that are kept.
    resume: continue the run in `workdir`, if there is one.
    compilation_cache: the folder that keeps compiled programs, so that the next
      command that needs them starts in seconds; `user` is tokenlora_jax/xla in
      the user's cache folder, "" keeps none.

  Example:
    >>> Config(workdir="runs/a", seed=1).to_json()["seed"]
    1
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
    """Returns the `Config` inside a command's parsed arguments."""
    return cls(
      **{f.name: getattr(args, f.name) for f in dataclasses.fields(cls)}
    )

  def to_json(self) -> dict:
    """Returns the settings as nested dicts of JSON values."""
    return json.loads(json.dumps(dataclasses.asdict(self)))


def differences(
  old: object, new: Mapping, ignored: Sequence[str] = ()
) -> list[str]:
  """Returns one line for each setting in which two configs differ.

  Args:
    old: nested dicts of settings.
    new: nested dicts of settings.
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
