"""Runs `tokenlora_jax/commands/infer.py`, which documents its subcommands."""

from tokenlora_jax.commands.infer import main, script

__all__ = ["main"]

if __name__ == "__main__":
  script()
