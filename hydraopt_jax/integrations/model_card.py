"""The model card of a store on the hub: its tasks, their errors, and how to use them.

This package writes the part between two marks. Other text and front matter of an existing card stay.
"""

import html
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hydraopt_jax import remote, report
from hydraopt_jax.deferred import size_of
from hydraopt_jax.formats.adapter_folder import weights_file
from hydraopt_jax.formats.peft import file_digest
from hydraopt_jax.formats.peft_config import base_name
from hydraopt_jax.integrations.vllm import MIDDLEWARE
from hydraopt_jax.store import Store, manifest, schema
from hydraopt_jax.store.store import closure, counted, places_of, task_errors

BEGIN, END = "<!-- hydraopt: begin -->", "<!-- hydraopt: end -->"
TAGS = ("hydraopt", "lora", "peft", "adapter", "model-compression")
# name of the license if the adapters have several, or if some are unknown
SEVERAL = "those-of-the-adapters"
# maximum rows of the table of tasks
ROWS = 200
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def bytes_of_tasks(store: Store) -> dict[str, int]:
    """Task -> bytes of all leaves that are read to decode it, including shared ones."""
    groups = [schema.head_groups(x.modules) for x in store.segments]
    out = {}
    for task in store.tasks:
        wanted = {n: {k} for n, (k,) in places_of(store, [task]).items()}
        total = 0
        for n, places in closure(store.segments, wanted).items():
            leaves = store.segments[n].leaves
            names = {"shared", "prediction", *(f"task_{k}" for k in places)}
            names |= {f"head_{k}" for k, users in enumerate(groups[n]) if places & set(users)}
            names |= {f"tensors_{k}" for k in wanted.get(n, ())}
            total += sum(size_of(leaves[x]) for x in names if x in leaves)
        out[task] = total
    return out


def bases_of(store: Store) -> tuple[str, ...]:
    """Names of the base models of a store's adapters, in order of appearance."""
    return tuple(dict.fromkeys(x for x in (base_name(s.config) for s in store.sources) if x))


def licenses_of(store: Store) -> dict[str, str]:
    """Task -> license in its adapter's configuration or in the model card beside it, if known.

    Cards of adapters from the hub are fetched from there; cards that cannot be fetched are left out.
    """
    found: dict[str, str] = {}
    asked: dict[str, str] = {}
    for task, source in zip(store.tasks, store.sources, strict=True):
        said = source.config.get("license")
        if not isinstance(said, str):
            if source.origin not in asked:
                asked[source.origin] = license_of(source.origin, source.digest)
            said = asked[source.origin]
        if said:
            found[task] = said
    return found


def license_of(origin: str, digest: str) -> str:
    """The license in the model card of an adapter; "" if there is none.

    A card on this machine counts if the weights beside it have that digest: of a pulled store the origins are
    names of folders, and another one may have such a name.
    """
    from huggingface_hub import HfApi, ModelCard

    try:
        if origin.startswith(remote.HUB):
            name, _, revision = origin.removeprefix(remote.HUB).partition("@")
            data = HfApi().model_info(name, revision=revision or None).card_data
        else:
            file = Path(origin) / "README.md"
            own = bool(origin) and file.is_file() and file_digest(weights_file(Path(origin))) == digest
            data = ModelCard.load(file).data if own else None
    except (MemoryError, KeyboardInterrupt):
        raise
    except Exception:  # an invalid card, or no network: the license is unknown
        return ""
    said = None if data is None else data.get("license")
    return said if isinstance(said, str) else ""


def render(
    store: Store,
    repository: str,
    file: str,
    size: int,
    licenses: Mapping[str, str],
    license: str | None = None,
    before: str | None = None,
) -> str:
    """The text of the card.

    Args:
      store: the pushed store.
      repository, file, size: ORG/NAME, name of the store's file there, and its bytes.
      licenses: task -> license, where known.
      license: of the store; None for the common license of all tasks.
      before: the existing card.
    """
    from huggingface_hub import ModelCard, ModelCardData

    ours = front_matter(store, file, size, licenses, license)
    body = f"{BEGIN}\n{text_of(store, repository, file, size, licenses)}\n{END}\n"
    if before is None:
        return str(ModelCard(f"---\n{ModelCardData(**ours).to_yaml()}\n---\n\n{body}"))
    card = ModelCard(before, ignore_metadata_errors=True)
    known = card.data.to_dict()
    if license is None and known.get("license") and known.get("license_name") != SEVERAL:
        # somebody has decided it
        ours = {k: v for k, v in ours.items() if k not in ("license", "license_name")}
    if "license" in ours and "license_name" not in ours and known.get("license_name") == SEVERAL:
        known.pop("license_name")
    tags = [*(known.get("tags") or ()), *ours["tags"]]
    known |= ours | {"tags": list(dict.fromkeys(tags))}
    head, begin, rest = card.text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    text = f"\n{body}\n" + card.text.lstrip("\n")
    if begin and end:
        text = head + body + tail.removeprefix("\n")
    data = ModelCardData(**known, ignore_metadata_errors=True)
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n{text}", ignore_metadata_errors=True))


def front_matter(
    store: Store, file: str, size: int, licenses: Mapping[str, str], license: str | None
) -> dict[str, Any]:
    """The front matter of the card, which the hub reads."""
    out: dict[str, Any] = {"library_name": "hydraopt-jax", "tags": list(TAGS)}
    # the hub takes ids of its own only, and a path of this machine is nobody's business
    known = [x for x in bases_of(store) if HUB_ID.fullmatch(x) and not Path(x).exists()]
    if known:
        out |= {"base_model": known[0] if len(known) == 1 else known, "base_model_relation": "adapter"}
    every = {licenses.get(t) for t in store.tasks}
    if license is None and len(every) == 1:
        (license,) = every
    if license is not None:
        out["license"] = license
    elif any(every):
        out |= {"license": "other", "license_name": SEVERAL}
    described = {"version": manifest.VERSION, "file": file, "bytes": size, "tasks": list(store.tasks)}
    return out | {"hydraopt": described}


def code(text: str) -> str:
    """A name as code in a cell of a table, with any characters escaped."""
    escaped = html.escape(" ".join(text.split())).replace("|", "&#124;")
    return f"<code>{escaped}</code>"


def table(store: Store, licenses: Mapping[str, str]) -> list[str]:
    """Rows of the table of tasks."""
    claims = {"error of weights": store.errors, "error of outputs": store.output_errors}
    columns = {k: task_errors(v) for k, v in claims.items() if v is not None}
    heads = ["task", *columns, "bytes to read it", *(["license"] if licenses else [])]
    rows = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    taken = bytes_of_tasks(store)
    bounds = set(store.report.get("bounded", ()))
    for k, task in enumerate(store.tasks[:ROWS]):
        cells = [code(task), *(f"{'at most ' * (task in bounds)}{x[k]:.2e}" for x in columns.values())]
        cells.append(f"{taken[task]:,}")
        cells += [code(licenses[task]) if task in licenses else "not known"] if licenses else []
        rows.append(f"| {' | '.join(cells)} |")
    if len(store.tasks) > ROWS:
        rows += ["", f"and {len(store.tasks) - ROWS} more: `hydraopt inspect` lists them."]
    return rows


def text_of(store: Store, repository: str, file: str, size: int, licenses: Mapping[str, str]) -> str:
    """The part of the card that this package writes."""
    shown = [x if HUB_ID.fullmatch(x) else Path(x).name for x in bases_of(store)]
    entries = store.report.get("entries", 0)
    share = f", {size / (2 * entries):.1%} of what they take in fp16" if entries else ""
    mean = float(np.nanmean(store.errors)) if store.errors.size else 0.0
    count = counted(len(store.tasks), "LoRA adapter")
    adapters = f"{count} of {' and '.join(map(code, shown)) or 'a base model'}"
    return "\n".join(
        [
            f"# {repository.partition('/')[2]}",
            "",
            f"{adapters} in one file, `{file}`: {report.format_bytes(size)}{share}. Written by hydraopt_jax. "
            "Each task can be read without the others: of the file only the header and what the task needs "
            "are fetched.",
            "",
            "Errors are relative squared errors, `|delta - stored|^2 / |delta|^2`, measured on what is "
            f"stored; their mean is {mean:.2e}.",
            "",
            *table(store, licenses),
            "",
            *usage(store.tasks[0], repository, file, shown[0] if shown else "BASE"),
        ]
    )


def usage(task: str, repository: str, file: str, base: str) -> Sequence[str]:
    """The section on how to use a task."""
    address = f"{remote.HUB}{repository}" + (f"/{file}" if file != remote.FILE else "")
    folder = re.sub(r"[^\w.-]", "-", task)
    return (
        "## Use",
        "",
        "PEFT, from a folder that any PEFT reader loads:",
        "",
        "```bash",
        "pip install 'hydraopt-jax[hub,peft]'",
        f"hydraopt export {address} --task {shlex.quote(task)} --out {folder}",
        "```",
        "",
        "```python",
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM",
        "",
        f"model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({base!r}), {folder!r})",
        "```",
        "",
        "vLLM, every task by its name in a request (`model=TASK`):",
        "",
        "```bash",
        f"hydraopt pull {address.removeprefix(remote.HUB)} store.safetensors",
        f"HYDRAOPT_STORE=store.safetensors vllm serve {shlex.quote(base)} --enable-lora \\",
        f"  --middleware {MIDDLEWARE}",
        "```",
        "",
        "JAX:",
        "",
        "```python",
        "import hydraopt_jax as hydra",
        "",
        f"store = hydra.open({address!r})",
        f"adapter = hydra.decode(store, {task!r})  # module -> a [in, rank], b [rank, out]",
        "```",
    )
