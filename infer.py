"""Mixes a bank of LoRA adapters while a frozen Llama makes text.

  python infer.py --prompt TEXT ...       make text, with who led each token
  python infer.py evaluate ...            ways to mix compared on held-out rows
  python infer.py --plan v5e:1x1 ...      would it fit there, and how fast
  python infer.py bank ...                what is in a bank; bank-add and
                                          bank-drop change it
  python infer.py export ...              a mixture as one PEFT folder

Prompts come from --prompt, --prompts-file, --examples, or standard input. A
line is a prompt; in a .jsonl file, or where the first line of standard input is
like that, it is {"prompt": "..."}, which may hold newlines, or
{"messages": [{"role": "user", "content": "..."}]}.
"""

from tokenlora_jax.commands.infer import main, script

__all__ = ["main"]

if __name__ == "__main__":
  script()
