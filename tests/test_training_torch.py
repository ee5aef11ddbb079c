"""Training against PyTorch with PEFT, on the same weights and rows."""

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
from tiny import (
  SHAPE,
  TWO,
  assert_identical,
  by_projection,
  first_batches,
  make_config,
  one_device,
  random_state,
  run_steps,
)
import torch
from torch_llama import in_torch, torch_config, torch_name
import transformers

from tokenlora_jax.model.llama import Llama


@pytest.fixture(scope="module")
def llama():
  """A random Llama of transformers."""
  torch.manual_seed(0)
  return transformers.LlamaForCausalLM(
    torch_config(SHAPE, initializer_range=0.2, attn_implementation="eager")
  )


def ours(llama) -> Llama:
  weights = {name: w.numpy() for name, w in llama.state_dict().items()}

  def read(name):
    return in_torch(name, weights[torch_name(name)])

  def make(name, shape):
    if "*" in name:
      layers = (name.replace("*", str(i)) for i in range(SHAPE.layers))
      w = np.stack([read(layer) for layer in layers])
    else:
      w = read(name)
    assert w.shape == shape
    return jnp.array(w)

  return Llama(SHAPE, by_projection(SHAPE, make), stacked=True)


def torch_run(llama, loras, expert, batches, optim):
  """A training loop as PyTorch's users write it: losses, norms, weights."""
  model = peft.get_peft_model(
    llama,
    peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]),
  )

  def modules():
    for i, layer in enumerate(model.base_model.model.model.layers):
      yield i, "q", layer.self_attn.q_proj
      yield i, "v", layer.self_attn.v_proj

  for i, name, module in modules():
    a, b = np.array(loras[name].a), np.array(loras[name].b)
    module.lora_A["default"].weight.data[:] = torch.tensor(a[expert, i])
    module.lora_B["default"].weight.data[:] = torch.tensor(b[expert, i].T)
  weights = [p for p in model.parameters() if p.requires_grad]
  optimizer = torch.optim.AdamW(
    weights, optim.learning_rate, weight_decay=optim.weight_decay
  )
  scheduler = (
    transformers.get_cosine_schedule_with_warmup(
      optimizer, optim.warmup_steps, optim.steps
    )
    if optim.schedule == "cosine"
    else transformers.get_constant_schedule_with_warmup(
      optimizer, optim.warmup_steps
    )
  )
  model.train()
  losses, norms = [], []
  for batch in batches:
    batch = {name: torch.tensor(x[expert]) for name, x in batch.items()}
    tokens = batch["tokens"].long()
    labels = torch.where(batch["loss_mask"] > 0, tokens, -100)
    loss = model(
      input_ids=tokens, attention_mask=batch["segment_ids"], labels=labels
    ).loss
    optimizer.zero_grad()
    loss.backward()
    norms.append(torch.nn.utils.clip_grad_norm_(weights, 1.0).item())
    optimizer.step()
    scheduler.step()
    losses.append(loss.item())
  trained = {
    (name, i): (
      module.lora_A["default"].weight.detach().numpy().copy(),
      module.lora_B["default"].weight.detach().numpy().T.copy(),
    )
    for i, name, module in modules()
  }
  model.unload()
  return losses, norms, trained


@pytest.mark.parametrize(
  ("tasks", "optim"),
  [
    (("squad",), {"weight_decay": 0.1, "schedule": "constant"}),
    (TWO, {}),
  ],
  ids=["one-expert", "two-experts"],
)
def test_ten_steps_follow_torch_and_peft(llama, tasks, optim):
  config = make_config(tasks, optim=optim)
  base, mesh = ours(llama), one_device()
  before = jax.tree.map(np.array, base)
  batches = first_batches(config, 10)
  state = random_state(config, base, mesh)
  first = jax.device_get(state.loras)
  state, losses, norms = run_steps(config, base, mesh, batches, state)

  # Clipping is at work.
  assert norms.max() > 1.0
  for expert in range(len(tasks)):
    their_losses, their_norms, trained = torch_run(
      llama, first, expert, batches, config.optim
    )
    np.testing.assert_allclose(losses[:, expert], their_losses, atol=1e-4)
    np.testing.assert_allclose(norms[:, expert], their_norms, rtol=1e-3)
    for (name, i), (a, b) in trained.items():
      lora = state.loras[name]
      np.testing.assert_allclose(lora.a[expert, i], a, atol=1e-4)
      np.testing.assert_allclose(lora.b[expert, i], b, atol=1e-4)
      moved = np.abs(b - first[name].b[expert, i]).max()
      assert moved > 1e-2, "the steps must be large enough to compare"
  assert_identical(base, before)
