"""Writes the tables of weights/README.md from what the code goes by: VARIANTS and registry.json.

PYTHONPATH=. python weights/make_tables.py
"""

from pathlib import Path

from cifar_jax.models.preprocess import Preprocessing
from cifar_jax.pretrained import registry
from cifar_jax.pretrained.variants import VARIANTS, Variant

README = Path(__file__).with_name("README.md")


def variants_table() -> list[str]:
    """How the networks of each family are run."""
    head = ("variant", "names", "stride", "conv bias", "BN epsilon", "max-pool", "image size", "input, 0..255")
    return _table(head, [_variant_cells(variant) for variant in VARIANTS.values()])


def _variant_cells(variant: Variant) -> tuple[str, ...]:
    config = variant.config
    return (
        f"`{variant.name}`",
        variant.family,
        "1x1" if config.stride_in_1x1 else "3x3",
        "yes" if config.conv_bias else "no",
        f"{config.bn_epsilon:g}",
        "padded" if config.pool_padding else "not padded",
        str(variant.image_size),
        _words(variant.preprocessing),
    )


def _words(preprocessing: Preprocessing) -> str:
    mean, std = (" ".join(f"{value:g}" for value in values) for values in (preprocessing.mean, preprocessing.std))
    scaled = f" / {preprocessing.scale:g}" if preprocessing.scale != 1 else ""
    divided = f", by {std}" if set(preprocessing.std) != {1.0} else ""
    return f"`{preprocessing.name}`: {preprocessing.channels.upper()}{scaled}, minus {mean}{divided}"


def files_table() -> list[str]:
    """The published files that are known by hash."""
    head = ("name", "file", "variant", "bytes", "hash", "licence", "top-1", "photos")
    rows = []
    for entry in registry.entries().values():
        file = f"[{entry.file}]({entry.url})" if entry.url else entry.file
        about = (f"`{entry.name}`", file, entry.variant, str(entry.size), f"`{entry.digest}`")
        photos = entry.transform.words() if entry.transform else "default"
        rows.append((*about, entry.licence, entry.top1, photos))
    return _table(head, rows)


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (head, ("---",) * len(head), *rows)]


TABLES = {"variants": variants_table, "files": files_table}


def with_tables(text: str) -> str:
    """A README with its tables, which stand between comments that name them, as the code has them now."""
    for name, make in TABLES.items():
        before, mark, rest = text.partition(f"<!-- {name} -->\n")
        _, end, after = rest.partition(f"<!-- end of {name} -->\n")
        if not (mark and end):
            raise SystemExit(f"{README} has no place for the table of {name}.")
        text = "".join([before, mark, "\n".join(make()), "\n", end, after])
    return text


if __name__ == "__main__":
    README.write_text(with_tables(README.read_text(encoding="utf-8")), encoding="utf-8")
