"""Where adapters are served: each partner is imported only when it is used.

- `folders`: a store's tasks as adapter folders on demand (SGLang, LoRAX), in a bounded `cache`.
- `vllm`: a plugin by which vLLM serves a store's tasks by name.
- `peft`: a task into a PEFT model, without a folder.
- `hub`: stores pushed to the Hugging Face hub and pulled from it, with a `model_card`.
"""

from hydraopt_jax.integrations.folders import TaskFolders

__all__ = ["TaskFolders"]
