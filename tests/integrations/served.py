"""A store of many small tasks, and what a server must answer for each."""

import numpy as np
from plain_stores import plain_store

from hydraopt_jax import store
from hydraopt_jax.factors import Factors
from hydraopt_jax.static import Static

BASE = "org/base"
SHAPES = {"model.layers.0.self_attn.q_proj": (12, 10), "model.layers.0.self_attn.v_proj": (12, 6)}
CONFIG = {
    "peft_type": "LORA",
    "base_model_name_or_path": BASE,
    "r": 2,
    "lora_alpha": 4,
    "target_modules": ["q_proj", "v_proj"],
}


def names(count):
    """Task names, some of which need care as file names."""
    return [f"task{'/. -'[n % 4]}{n}" for n in range(count)]


def make(tasks, seed=0):
    """A store in memory."""
    rng, every = np.random.default_rng(seed), np.arange(len(tasks), dtype=np.int32)
    modules = {}
    for name, (inputs, outputs) in SHAPES.items():
        a = rng.normal(size=(len(tasks), inputs, 2)).astype(np.float32)
        b = rng.normal(size=(len(tasks), 2, outputs)).astype(np.float32)
        modules[name] = (Factors(a, b, every, every),)
    found = plain_store(tasks, modules)
    return found.replace(sources=tuple(x._replace(config=Static(CONFIG)) for x in found.sources))


def answers(content):
    """Task -> module -> what the fake server answers."""
    out = {}
    for task in content.tasks:
        x = store.decode(content, task)
        out[task] = {n: float((x.a[n] @ x.b[n]).sum()) for n in x.a}
    return out


def right(found, expected):
    """Whether a server's answer is the task's own."""
    return found.keys() == expected.keys() and all(
        abs(found[n] - x) < 1e-3 * max(1, abs(x)) for n, x in expected.items()
    )


def write_trained(place):
    """Write adapters of one base, one folder with a card, and their store, to which one was added."""
    # they need JAX, which a server that serves a store has not
    from hydraopt_jax import changes, compression, formats, synthetic

    made = synthetic.collection(
        5,
        tasks=["one", "two|<b>/three", "a.b", "four"],
        modules=synthetic.transformer_modules(2, 128, 64),
        rank=4,
        likeness=0.8,
        dtype="float32",
    )
    known = []
    for n, x in enumerate(made):
        config = {**x.config, "base_model_name_or_path": "org/base-1b"}
        formats.write_adapter(place / f"in{n}", x.replace(config=config))
        known.append(formats.read_adapter(place / f"in{n}", task=x.task))
    (place / "in0" / "README.md").write_text("---\nlicense: apache-2.0\n---\nOne.\n")
    found = changes.add(compression.compress(known[:3], max_error=1e-5), known[3])
    store.save(place / "s.safetensors", found)
    store.save(place / "s", found)
