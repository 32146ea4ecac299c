"""Fetches the tasks' files from their public homes, at one commit each, and checks them.

    python -m experiments.llm.sources --data DIR

Eight repositories, 71 files, 10 MB; their licenses stand in README.md. A complete copy is only checked.
Where git-hosted files are not to be had, any folder with the same files serves: all commands take --data.
"""

import argparse
from pathlib import Path

from experiments.morphology.download import Remote, fetch_all

SUMS = Path(__file__).with_name("SHA256SUMS")
HOMES = {
    "asset": "facebookresearch/asset/9d659040",
    "dataset": "multi30k/dataset/a3d2e0d2",
    "e2e-dataset": "tuetschek/e2e-dataset/ab0d967d",
    "jfleg": "keisks/jfleg/ee06ff80",
    "nl2bash": "TellinaTool/nl2bash/466c5fe8",
    "oos-eval": "clinc/oos-eval/828f8093",
    "tweeteval": "cardiffnlp/tweeteval/4fbd22cd",
    "xquad": "google-deepmind/xquad/7d30520c",
}


def remotes(sums: Path = SUMS) -> list[Remote]:
    """Every file of the tasks.

    >>> len(remotes())
    71
    """
    out = []
    for line in sums.read_text(encoding="utf-8").splitlines():
        digest, name = line.split()
        folder, path = name.split("/", 1)
        out.append(Remote(name, f"https://raw.githubusercontent.com/{HOMES[folder]}/{path}", digest))
    return out


def main(argv: list[str] | None = None) -> None:
    """Downloads or, where all is there, only checks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--data", type=Path, required=True, help="folder to fill; a complete copy is only checked"
    )
    given = parser.parse_args(argv)
    files = remotes()
    try:
        fetched = fetch_all(files, given.data)
    except (OSError, ValueError) as error:
        raise SystemExit(f"sources: {error}") from error
    print(f"{len(files)} files in {given.data}, {fetched} of them fetched now; all sums agree")


if __name__ == "__main__":
    main()
