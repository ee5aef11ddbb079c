"""Bank folders of adapters: reading, writing, editing and export."""
