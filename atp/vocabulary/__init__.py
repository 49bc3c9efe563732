"""A vocabulary trimmed to a domain: the words to keep, the tokenizer that has only these, and the rows of the model."""
