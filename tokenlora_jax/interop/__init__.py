"""Every foreign format, and the only imports of the libraries that read them."""
