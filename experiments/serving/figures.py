"""Regions of the pages on stored tasks in use, see `experiments.figures`."""

from collections.abc import Callable

from experiments.markdown import markdown, megabytes, read, wrapped

MACHINES = {"1": "one_core", "2": "two_cores"}


def mixed() -> str:
    """Milliseconds of a mixed batch, and how many times faster than a gather and a loop."""
    rows = []
    for cores, name in MACHINES.items():
        for x in read(f"serving/{name}.json")["rows"]:
            times = x["times faster"]
            once = f" ({times['loop, shared once']:.3g})" if "loop, shared once" in times else ""
            rows.append(
                [
                    cores,
                    x["case"],
                    x["form"],
                    f"{x['milliseconds']['this package']:.3g}",
                    f"{times['gather']:.3g}",
                    f"{times['loop']:.3g}{once}",
                ]
            )
    return markdown(["cores", "case", "form", "ms", "times the gather", "times the loop"], rows)


def deviation() -> str:
    """The largest deviation from the dense deltas."""
    found = [x for name in MACHINES.values() for x in read(f"serving/{name}.json")["rows"]]
    worst = max(v for x in found for k, v in x.items() if k.startswith("largest deviation"))
    return f"Results differ from the dense deltas by at most {worst:.2g} of their largest entry.\n"


def costs() -> str:
    """What a stored task costs over HTTP, on the device, in lines and in PEFT."""
    found = read("serving/costs.json")
    http, device, peft = found["http"], found["device"], found["peft"]
    worst = max(http["rows"], key=lambda x: x["ratio"])
    rows = [
        [
            f"one of {http['tasks']} tasks over HTTP, over its headers and codes",
            f"{worst['ratio']:.3f} ({worst['fetched']:,} bytes of {megabytes(http['store'])} MB)",
            "1.05",
        ],
        [
            f"`serving.load` of the {http['tasks']}, over the fp16 bytes",
            f"{device['ratio']:.2f} ({megabytes(device['held'])} MB)",
            "1",
        ],
        ["lines from imports to an answer in PEFT", str(found["lines"]), "5"],
        [
            "swap of a task in PEFT beside its decoding, over PEFT's load of the folder",
            f"{peft['swap_beside_decoding']:.2f}",
            "2",
        ],
    ]
    return markdown(["what", "found", "goal"], rows)


def swap() -> str:
    """Processor seconds of the swap into PEFT."""
    x = read("serving/costs.json")["peft"]
    return wrapped(
        [
            "The swap is of rank 16 on the attention of an 8B Llama, 32 layers,",
            f"{x['numbers'] / 1e6:.1f} million numbers: {x['swap']:.2f} processor seconds in all,",
            f"{x['swap'] - x['swap_beside_decoding'] * x['folder']:.2f} of them decoding;",
            f"PEFT's load of the folder takes {x['folder']:.2f}.",
        ]
    )


REGIONS: dict[str, Callable[[], str]] = {
    "mixed batches": mixed,
    "deviation of mixed batches": deviation,
    "what a stored task costs": costs,
    "swap of a stored task": swap,
}
