"""Facts about this machine for `info`: versions, devices, weights, data sets and the cache."""

import time
from collections.abc import Callable
from typing import Any

from cifar_jax.data.sources.tfds import data_root
from cifar_jax.files import cache_root
from cifar_jax.pretrained import UNTRAINED, registry
from cifar_jax.runtime.caches import contents
from cifar_jax.runtime.machine_info import device_description, device_rows, known_fault, package_versions


def collect(topic: str = "all", data_dir: str | None = None, cache_dir: str | None = None) -> dict[str, Any]:
    """Collects the facts about one topic, or about all but devices and cache, by topic.

    Returns:
      JSON values: for each topic a dict to show line by line, or a list of rows.
    """
    topics: dict[str, Callable[[], Any]] = {
        "environment": lambda: _environment(cache_dir),
        "weights": lambda: _weights_rows(cache_dir),
        "data": lambda: _data(data_dir),
        "devices": device_rows,
        "cache": lambda: _cache_rows(cache_dir),
    }
    only_by_name = {"devices", "cache"}
    chosen = topics.keys() - only_by_name if topic == "all" else {topic}
    return {name: facts() for name, facts in topics.items() if name in chosen}


def _environment(cache_dir: str | None) -> dict[str, str]:
    versions = ", ".join(f"{name} {version}" for name, version in package_versions().items())
    facts = {"device": device_description(), "versions": versions, "cache": str(cache_root(cache_dir))}
    return facts | ({"known fault": fault} if (fault := known_fault()) else {})


def _weights_rows(cache_dir: str | None) -> list[dict[str, str]]:
    rows = [
        {
            "name": entry.name,
            "MB": f"{entry.size / 1e6:.1f}",
            "digest": entry.digest,
            "licence": entry.licence,
            "top-1": entry.top1,
            "variant": entry.variant,
            "local copy": str(registry.find_local(entry, cache_dir)[0] or "none"),
        }
        for entry in registry.entries().values()
    ]
    untrained = dict.fromkeys(rows[0], "") | {"variant": "untrained", "local copy": "made when needed"}
    return rows + [untrained | {"name": name} for name in UNTRAINED]


def _data(data_dir: str | None) -> dict[str, str]:
    root = data_root(data_dir)
    prepared = sorted(path.parent for path in root.glob("*/*/dataset_info.json"))
    found = ", ".join(f"{path.parent.name} {path.name}" for path in prepared)
    return {"data sets": f"{found or 'none'} in {root}", "drawn": "shapes, anywhere"}


def _cache_rows(cache_dir: str | None) -> list[dict[str, Any]]:
    """Rows of the cache's contents."""
    rows = [
        {
            "what": entry.about.get("what", entry.kind),
            "MB": f"{entry.size / 1e6:.1f}",
            "last used": time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.last_used)),
            "images": entry.about.get("images", ""),
            "backbone": entry.about.get("backbone", ""),
            "path": str(entry.path),
        }
        for entry in contents(cache_root(cache_dir))
    ]
    return rows or [{"what": "nothing", "path": str(cache_root(cache_dir))}]
