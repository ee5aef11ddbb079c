"""The frozen Llama, its stacked adapters and its cache."""
