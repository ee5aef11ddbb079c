"""Other people's files, and the only imports of the libraries that read them."""
