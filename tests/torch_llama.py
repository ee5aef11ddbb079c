"""A Llama of transformers with the shape of one of ours, and its names."""

import transformers

from tokenlora_jax.model.config import LlamaConfig

MODULES = {
  "embedding": "model.embed_tokens",
  "norm": "model.norm",
  "head": "lm_head",
  "attention_norm": "input_layernorm",
  "mlp_norm": "post_attention_layernorm",
  **{x: f"self_attn.{x}_proj" for x in "qkvo"},
  **{x: f"mlp.{x}_proj" for x in ("gate", "up", "down")},
}


def torch_config(shape: LlamaConfig, **more) -> transformers.LlamaConfig:
  return transformers.LlamaConfig(
    vocab_size=shape.vocab,
    hidden_size=shape.width,
    intermediate_size=shape.mlp_width,
    num_hidden_layers=shape.layers,
    num_attention_heads=shape.heads,
    num_key_value_heads=shape.kv_heads,
    head_dim=shape.head_width,
    rms_norm_eps=shape.norm_eps,
    rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
    tie_word_embeddings=shape.tied,
    **more,
  )


def torch_name(name: str) -> str:
  """Their name of our parameter without biases: layers.0.q.kernel, norm."""
  if not name.startswith("layers."):
    return f"{MODULES[name]}.weight"
  _, layer, module, *_ = name.split(".")
  return f"model.layers.{layer}.{MODULES[module]}.weight"


def in_torch(name: str, x):
  """Our parameter as they keep it, or theirs as we do."""
  return x.T if name == "head" or name.endswith(".kernel") else x
