"""The training loop: phases, steps, checkpoints and callbacks."""
