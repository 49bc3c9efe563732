"""The mask spaces: one file per space. Importing a space here registers it."""

from atp.spaces import disp, head_dim, kv_group

__all__ = ["disp", "head_dim", "kv_group"]
