"""The mask spaces: one file per space. Importing a space here registers it."""

from atp.spaces import head_dim, kv_group

__all__ = ["head_dim", "kv_group"]
