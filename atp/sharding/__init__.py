"""Frozen weights in shards: every process holds its rows of each, and gathers a layer while it computes with it."""
