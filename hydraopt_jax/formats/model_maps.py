"""Conversion of adapters between Hugging Face's module names and shapes and those of JAX libraries.

Hugging Face's names are the common form: PEFT writes them and stores have them. Each library needs one table
of `families`.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from hydraopt_jax.adapters import Adapter
from hydraopt_jax.errors import HydraOptError, near
from hydraopt_jax.formats.families import FAMILIES, LIBRARIES, Library, ModuleRow, Table

_LAYER = re.compile(r"(?P<prefix>.+)\.(?P<n>\d+)\.(?P<module>.+)")
# prefixes of a language model's layers; other towers (vision, audio) have names of their own
_LANGUAGE = re.compile(r"(?:(?:base_model|model|language_model|text_model)\.)*layers")
_STACKED = re.compile(r"(?P<name>.+)\[(?P<index>\d+)\]")


class ModuleMatch(NamedTuple):
    """A module of a library: row, layer, and whether the layer is counted from the end of the stacks."""

    row: ModuleRow
    n: int
    behind: bool = False


def table_of(family: str, library: str) -> tuple[Table, Library]:
    """The table of a family in a library.

    Raises:
      HydraOptError: an unknown family or library; the known ones are listed.
    """
    if family not in FAMILIES:
        raise HydraOptError(f"family {family!r}: must be one of {', '.join(FAMILIES)}")
    if library not in FAMILIES[family]:
        raise HydraOptError(
            f"library {library!r} has no table of family {family!r}: must be one of "
            f"{', '.join(FAMILIES[family])}"
        )
    return FAMILIES[family][library], LIBRARIES[library]


def tree_name(path: str) -> str:
    """The module name in `trees` of a parameter's path.

    >>> tree_name("attn/q_proj/w"), tree_name("mlp/wo/kernel")
    ('attn.q_proj.w', 'mlp.wo')
    """
    return path.removesuffix("/kernel").replace("/", ".")


def heads(name: str, side: str, size: int, head_dim: int | None) -> list[int]:
    """Count and size of the heads of one side."""
    if head_dim is None:
        raise HydraOptError(
            f"{name}: its {side}puts are split into heads: give head_dim (--head-dim), as "
            "in the base model's config.json"
        )
    if head_dim < 1 or size % head_dim:
        raise HydraOptError(
            f"{name}: head_dim = {head_dim}: its {size} {side}puts are not a multiple of that size"
        )
    return [size // head_dim, head_dim]


def rotated(row: ModuleRow, b: np.ndarray, head_dim: int | None, name: str, back: bool) -> np.ndarray:
    """Output-side factors `[R, O]` in the library's order and scale of heads, or back in Hugging Face's."""
    if not (row.interleaved or row.scaled):
        return b
    size = heads(name, "out", b.shape[1], head_dim)[1]
    if row.interleaved:
        halves = (size // 2, 2) if back else (2, size // 2)
        b = b.reshape(b.shape[0], -1, *halves).swapaxes(-1, -2).reshape(b.shape)
    return b * np.float32(size ** (0.5 if back else -0.5)) if row.scaled else b


def to_library(
    adapter: Adapter,
    family: str,
    library: str,
    *,
    head_dim: int | None = None,
    scan: bool = False,
    layers: int | None = None,
    fused: bool | None = None,
    prefix: str | None = None,
) -> Adapter:
    """The adapter with a library's names and axes, for `write_tree` and `write_checkpoint`.

    Modules that share a parameter there (keys and values) are concatenated: their ranks add up, unless they
    have one input-side factor.

    Args:
      adapter: modules with Hugging Face's names, `model.layers.0.self_attn.q_proj`.
      family: a key of `families.FAMILIES`.
      library: "tunix", "maxtext" or "gemma", if the family has a table for it.
      head_dim: size of an attention head, as in the base model's config.json.
      scan: whether the library's model has stacked layers (MaxText's `scan_layers`).
      layers: number of the model's layers, if stacked; None for those up to the adapter's last.
      fused: whether queries, keys and values share a parameter, as in Gemma 7B; None to see it from the
        shapes of queries and keys, which then must both be there.
      prefix: text before the number of a layer; None for those of Hugging Face's language models.

    Raises:
      HydraOptError: an unknown family, library or module, a module of another tower, two modules of one
        parameter, sizes that are not multiples of a head, a model that the library does not stack, or a
        missing `fused`.
    """
    table, kept = table_of(family, library)
    if scan and not table.scanned:
        raise HydraOptError(f"{library} has no stacked layers of family {family!r}: leave scan out")
    parts: dict[str, tuple[dict[str, Any], list[tuple[ModuleRow, str]]]] = {}
    named = _places(adapter, library, family, prefix)
    count = max([*(n + 1 for n, _ in named.values()), layers or 0])
    if layers is not None and count > layers:
        raise HydraOptError(f"layers = {layers}: the adapter has modules of layer {count - 1}")
    rows = (*(table.fused if _is_fused(adapter, named, family, library, fused) else ()), *table.rows)
    for name, (n, module) in named.items():
        row = next(x for x in rows if x.module == module)
        path, stack = parameter_place(table, row, n, count if scan else 0)
        factors = {s: kept.factor.format(path=path, side=s).split("/") for s in "ab"}
        layout: dict[str, Any] = {s: [*x, "value"] if kept.boxed else x for s, x in factors.items()}
        key = tree_name(path)
        if stack is not None:
            layout["stack"] = stack
            key += f"[{stack[1]}]"
        parts.setdefault(key, (layout, []))[1].append((row, name))
    a, b, layouts = {}, {}, {}
    for key, (layout, members) in parts.items():
        row, name = members[0]
        inputs, outputs = adapter.a[name].shape[0], adapter.b[name].shape[1]
        axes = {
            "in": heads(name, "in", inputs, head_dim) if row.inputs == "N H" else [inputs],
            "out": heads(name, "out", outputs, head_dim) if row.outputs == "N H" else [outputs],
        }
        for member_row, member in members:
            sizes = [adapter.a[member].shape[0], adapter.b[member].shape[1]]
            if sizes != [inputs, outputs]:
                raise HydraOptError(
                    f"{member}: [in, out] = {sizes} beside {name}'s {[inputs, outputs]}: one parameter of "
                    f"{library}'s {family!r} holds both: name another family"
                )
            b[member] = rotated(member_row, adapter.b[member], head_dim, member, back=False)
        low, high = joined_factors(members, adapter.a, b) if row.slots else (adapter.a[name], b[name])
        for _, member in members:
            del b[member]
        a[key], b[key] = low, high
        axes["out"] = [*([row.slots] if row.slots else []), *axes["out"]]
        layouts[key] = layout | {k: v for k, v in axes.items() if len(v) > 1}
    return adapter.replace(a=a, b=b, layout=layouts, config={}, raw={})


def _places(adapter: Adapter, library: str, family: str, prefix: str | None) -> dict[str, tuple[int, str]]:
    """Layer and module of each Hugging Face name."""
    known = [x.module for x in table_of(family, library)[0].rows]
    found: dict[str, re.Match[str]] = {}
    for name in adapter.a:
        match = _LAYER.fullmatch(name)
        if match is None or match["module"] not in known:
            offered = near(match["module"] if match else name, known)
            raise HydraOptError(
                f"{name}: {library}'s {family!r} has no layer for it (near: {offered}): leave it out of the "
                "adapter, or name another family"
            )
        found[name] = match
    owners: dict[Any, str] = {}
    for name, match in found.items():
        other = owners.setdefault(match.group("n", "module"), name)
        if other != name:
            raise HydraOptError(
                f"{other} and {name}: are one parameter of {library}: leave one of them out of the adapter"
            )
    for name, match in found.items():
        own = match["prefix"]
        if own != prefix and (prefix is not None or not _LANGUAGE.fullmatch(own)):
            raise HydraOptError(
                f"{name}: is not named as a layer of a language model ({prefix or 'model.layers'}): leave it "
                f"out of the adapter or, if it is one, give prefix (--prefix {own})"
            )
    return {name: (int(match["n"]), match["module"]) for name, match in found.items()}


def _is_fused(
    adapter: Adapter, named: Mapping[str, tuple[int, str]], family: str, library: str, fused: bool | None
) -> bool:
    """Whether queries, keys and values share a parameter, as they do where they have one size."""
    table, _ = table_of(family, library)
    if fused and not table.fused:
        raise HydraOptError(
            f"{library}'s {family!r} has no parameter that queries, keys and values share: leave fused out"
        )
    if fused is not None or not table.fused:
        return bool(fused)
    query, *others = (x.module for x in table.fused)
    width = {place: adapter.b[name].shape[1] for name, place in named.items()}
    pairs = [((n, query), (n, x)) for n, module in width if module == query for x in others]
    equal = [width[x] == width[y] for x, y in pairs if y in width]
    some = next((x for x, (_, module) in named.items() if module in (query, *others)), None)
    if some is not None and not equal:
        raise HydraOptError(
            f"{some}: without queries and keys or values of one layer it is unknown whether they share a "
            "parameter: give fused (--fused if config.json of the base model has as many num_key_value_heads "
            "as num_attention_heads, else --no-fused)"
        )
    return any(equal)


def parameter_place(table: Table, row: ModuleRow, n: int, scanned: int) -> tuple[str, list[int] | None]:
    """Path of layer n's parameter, and `[axis, index, length]` if the layer is in a stack.

    Args:
      scanned: number of stacked layers, 0 for none.
    """
    block, slot = divmod(n, table.period)
    blocks = scanned // table.period
    fields = {"n": n, "block": block, "slot": slot, "kind": table.kinds[slot % len(table.kinds)]}
    layer, stack = table.layer, None
    if scanned:
        layer, stack = (table.scanned, [1, block, blocks]) if block < blocks else (table.remainder, None)
    if not layer:
        raise HydraOptError(f"layers = {scanned}: no whole blocks of {table.period} layers: give layers")
    return f"{layer}/{row.path}".format(**fields), stack


def joined_factors(
    members: list[tuple[ModuleRow, str]], a: Mapping[str, np.ndarray], b: Mapping[str, np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Factors `[I, R]` and `[R, slots * O]` of modules that share a parameter."""
    first = a[members[0][1]]
    shared = all(a[name].shape == first.shape and (a[name] == first).all() for _, name in members)
    ranks = [0 if shared else a[name].shape[1] for _, name in members]
    starts = np.cumsum([0, *ranks])
    width = b[members[0][1]].shape[1]
    high = np.zeros((first.shape[1] if shared else int(starts[-1]), members[0][0].slots, width), np.float32)
    for (row, name), start in zip(members, starts, strict=False):
        high[start : start + b[name].shape[0], row.slot] = b[name]
    low = first if shared else np.concatenate([a[name] for _, name in members], axis=1)
    return low, high.reshape(high.shape[0], -1)


def from_library(
    adapter: Adapter, family: str, library: str, *, head_dim: int | None = None, prefix: str = "model.layers"
) -> Adapter:
    """The adapter with Hugging Face's names, as in PEFT and in stores: the inverse of `to_library`.

    Args:
      adapter: from `read_tree` or `read_checkpoint`.
      family, library: see `to_library`.
      head_dim: size of an attention head, needed if the library orders heads differently and its factors have
        no axis of that length.
      prefix: text before the number of a layer.

    Raises:
      HydraOptError: an unknown family, library or module, or a missing `head_dim`.
    """
    table, _ = table_of(family, library)
    patterns = list(_patterns(table))
    blocks = max((v["stack"][2] for v in adapter.layout.values() if "stack" in v), default=0)
    a, b = {}, {}
    for name, low in adapter.a.items():
        layout = adapter.layout.get(name) or {}
        founds = _find(table, patterns, name)
        if not founds:
            known = {tree_name(parameter_place(table, row, 0, 0)[0]) for row in (*table.fused, *table.rows)}
            raise HydraOptError(
                f"{name}: no LoRA layer of {library}'s {family!r} (near: {near(name, known)}): name another "
                "family or library"
            )
        own = layout.get("out", [])
        size = head_dim or (own[-1] if len(own) > 1 else None)
        for row, n, behind in founds:
            high = adapter.b[name]
            left = low
            if row.slots:
                if high.shape[1] % row.slots:
                    raise HydraOptError(f"{name}: its {high.shape[1]} outputs are no {row.slots} modules")
                high = high.reshape(high.shape[0], row.slots, -1)[:, row.slot]
                used = high.any(axis=1)  # directions of other modules, and padding, are zero here
                left, high = low[:, used], high[used]
            key = f"{prefix}.{n + blocks * table.period * behind}.{row.module}"
            if key in a:
                raise HydraOptError(f"{name}: {key} is there twice: stacked and by itself?")
            a[key], b[key] = left, rotated(row, high, size, name, back=True)
    return adapter.replace(a=a, b=b, layout={}, config={}, raw={})


def _patterns(table: Table) -> Iterator[tuple[ModuleRow, str, re.Pattern[str]]]:
    """Rows with regular expressions for their modules' names, and the kind of place of each."""
    numbers = {"{n}": r"(?P<n>\d+)", "{block}": r"(?P<block>\d+)", "{slot}": r"(?P<slot>\d+)"}
    for row in (*table.fused, *table.rows):
        for layer in filter(None, (table.layer, table.scanned, table.remainder)):
            for kind in table.kinds:
                text = re.escape(tree_name(f"{layer}/{row.path}".replace("{kind}", kind)))
                for field, pattern in numbers.items():
                    text = text.replace(re.escape(field), pattern)
                where = "stack" if layer == table.scanned else "behind" if layer == table.remainder else ""
                yield row, f"{where}:{kind}", re.compile(rf"(?:.+\.)?{text}")


def _find(
    table: Table, patterns: list[tuple[ModuleRow, str, re.Pattern[str]]], name: str
) -> list[ModuleMatch]:
    """The Hugging Face modules that a library's module stands for."""
    stacked = _STACKED.fullmatch(name)
    out = []
    for row, where, pattern in patterns:
        place, _, kind = where.partition(":")
        match = pattern.fullmatch(stacked["name"] if stacked else name)
        if match is None or (place == "stack") != bool(stacked):
            continue
        fields = match.groupdict()
        slot = int(fields.get("slot") or table.kinds.index(kind))
        block = int(stacked["index"]) if stacked else int(fields.get("block") or 0)
        n = int(fields["n"]) if "n" in fields else block * table.period + slot
        out.append(ModuleMatch(row, n, place == "behind"))
    return out


def hugging_face_name(family: str, library: str) -> Any:
    """A function from the path of a library's module to Hugging Face's name, for `rename=` of `serving`.

    Modules that share a parameter are a tuple, in the order of its slots; one that the table does not have
    keeps its path.

    >>> hugging_face_name("qwen", "tunix")("layers.3.attn.o_proj")
    'model.layers.3.self_attn.o_proj'
    >>> hugging_face_name("gemma3", "tunix")("layers.3.attn.kv_einsum")
    ('model.layers.3.self_attn.k_proj', 'model.layers.3.self_attn.v_proj')
    """
    table, _ = table_of(family, library)
    patterns = list(_patterns(table))

    def rename(path: str) -> str | tuple[str, ...]:
        founds = [x for end in ("", ".w") for x in _find(table, patterns, path + end)]
        names = tuple(f"model.layers.{x.n}.{x.row.module}" for x in founds)
        return path if not names else names if founds[0].row.slots else names[0]

    return rename
