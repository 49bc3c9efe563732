"""The result in other formats, with a model card."""
