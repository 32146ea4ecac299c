"""The demonstration and its model: five word-level tasks in eight languages, a character transformer."""
