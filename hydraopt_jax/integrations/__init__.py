"""Integrations with servers, PEFT and the hub. Each library is imported only when it is used.

- `folders`: a store's tasks as adapter folders on demand (SGLang, LoRAX), in a bounded `cache`.
- `vllm`: a plugin with which vLLM serves a store's tasks by name.
- `peft`: loads a task into a PEFT model without a folder.
- `transformers`: opens a model and gathers a calibration from a text.
- `hub`: pushes stores to the Hugging Face hub, with a `model_card`, and pulls them.
"""

from hydraopt_jax.integrations.folders import TaskFolders

__all__ = ["TaskFolders"]
