"""What a person types: command lines, and what they run."""
