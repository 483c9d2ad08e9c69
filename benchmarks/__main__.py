"""The command: `python -m benchmarks`, which is what `make bench` runs."""

import argparse
import re
import sys
import tempfile
from pathlib import Path

from benchmarks import machine, tables
from benchmarks.bench import QUICK, Bench, Sizes
from benchmarks.sections import SECTIONS


def main(arguments: list[str]) -> None:
    """Measures section by section, keeps each as soon as it is done, and prints its table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="This project's speed, and its peers'.")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, metavar="SECTION", help=f"of {', '.join(SECTIONS)}")
    parser.add_argument("--dataset", default="cifar10", help="cifar10, or shapes, which needs no download")
    parser.add_argument(
        "--out", type=Path, help="the file of results; by default this machine's, which docs/benchmarks.md shows"
    )
    parser.add_argument("--quick", action="store_true", help="tiny networks and no peers: whether it all runs")
    options = parser.parse_args(arguments)
    if options.quick and not options.out:
        parser.error("--quick measures nothing worth keeping: name a file with --out")
    names = options.only or [name for name in SECTIONS if name != "gpu" or machine.gpu_name()]
    with tempfile.TemporaryDirectory(prefix="cifar_jax-bench-") as directory:
        bench = Bench(Path(directory), options.dataset, QUICK if options.quick else Sizes())
        about = bench.elsewhere(machine.describe)
        out = options.out or tables.RESULTS / f"{_slug(about['device'])}.json"
        for name in names:
            print(f"Measuring: {name}", file=sys.stderr, flush=True)
            section = SECTIONS[name](bench).to_json()
            tables.write_results(out, name, section, about)
            print(f"\n{tables.table(section)}\n", flush=True)
            if not options.out:
                tables.update_page()


def _slug(device: str) -> str:
    return re.sub(r"\W+", "-", device.replace("(R)", "").lower()).strip("-")


if __name__ == "__main__":
    main(sys.argv[1:])
