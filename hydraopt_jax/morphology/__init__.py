"""Five word-level tasks in eight languages: a character transformer and its 40 trained LoRA adapters."""
