"""What a run would take on hardware that is not here, from the compiled program."""
