"""The cases of each operation."""
