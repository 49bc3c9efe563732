"""The `atp` command: its subcommands, what they print, and those that no other room needs (chat, scoring, drafts)."""
