"""Puts a finished frontier among the published results: cells, table, CSV and page, and its plots among the documents.

    thintune bench frontier --config benchmarks/frontier/fashion-56-4096.yaml ... --out runs/fashion-56-4096
    python benchmarks/frontier/publish.py runs/fashion-56-4096

Prints the table as Markdown.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

from thintune.bench.frontier.plots import angles, frontiers
from thintune.bench.frontier.report import to_markdown, verdicts

ROOT = Path(__file__).parent.parent.parent
FILES = ("bench.json", "frontier.json", "frontier.csv", "report.html")


def main() -> None:
    """Copies one folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="--out of the bench; its name is that of the results")
    parser.add_argument("--subspaces", default="", help="rows whose subspaces are drawn too, with commas between")
    arguments = parser.parse_args()
    source = arguments.folder
    target = ROOT / "benchmarks" / "results" / "frontier" / source.name
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source / "cells", target / "cells")
    for name in FILES:
        shutil.copy(source / name, target / name)
    document = json.loads((source / "frontier.json").read_text())
    images = ROOT / "docs" / "images"
    images.mkdir(exist_ok=True)
    (images / f"frontier-{source.name}.svg").write_text(frontiers(document["rows"]))
    rows = {row["name"]: row for row in document["rows"]}
    for name in filter(None, arguments.subspaces.split(",")):
        (images / f"subspaces-{source.name}-{name}.svg").write_text(angles(rows[name]))
    print(to_markdown(document))
    print("\n".join(verdicts(document["rows"])))


if __name__ == "__main__":
    main()
