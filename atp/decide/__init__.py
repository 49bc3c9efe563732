"""Decisions: what each structure is worth, and the mask that meets the budget."""
