"""The mask spaces: one file per space, and here the names that a config may hold, without torch."""

STRUCTURES = {
    "disp": ("attention_inputs", "attention_outputs", "mlp_inputs", "mlp_outputs", "mlp"),
    "experts": ("experts",),
    "expert_channels": ("expert_channels",),
    "head_dim": ("qk", "vo", "mlp"),
    "kv_group": ("kv_group", "mlp"),
    "mlp": ("mlp",),
}
"""For each space, which is also the name of its file, the structures that it builds, in order."""

WHOLE_WIDTHS = ("kv_group", "mlp", "experts", "expert_channels")
"""The spaces whose cuts leave nothing that transformers' own classes cannot have, where all layers are equal."""

EXPERT_SPACES = ("experts", "expert_channels")
"""The spaces of families whose MLPs are experts, which fit no other family."""

BLOCK_SPACES = ("kv_group", "mlp")
"""The spaces whose structures are whole blocks of a layer, which may go (`decisions.blocks`)."""


def space_names() -> list[str]:
    """The names of all mask spaces."""
    return list(STRUCTURES)


def structure_names() -> list[str]:
    """The names of the structures of all mask spaces, each once."""
    return list(dict.fromkeys(name for structures in STRUCTURES.values() for name in structures))
