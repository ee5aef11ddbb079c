"""How good a way to mix is, on held-out rows."""
