"""The demonstration: a character transformer with adapters for five word-level tasks in eight languages."""
