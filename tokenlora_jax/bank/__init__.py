"""Our own folder of adapters: read, written, edited, exported."""
