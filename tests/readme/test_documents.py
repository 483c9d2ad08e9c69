"""Commands are found in documents, and each is typed or listed with a reason not to be."""

import re

import numpy as np
import pytest
from PIL import Image

from cifar_jax.data.resize import Resize
from readme.catalogue import DOCUMENTS, IN_CI, NOT_TYPED
from readme.documents import Command, blocks, commands, steps
from readme.supplies import ROOT

EXAMPLE = """# A title, and `python one.py` in a line, `make it`, `Python`, `make` and `--make this`

```sh
# a comment alone

python two.py   # why
A=1 python three.py --id 0
```

<!-- by `python hidden.py` --> | `cifar-jax
four` | ``python no.py``

```python
x = "`python not.py`"
```
"""
ALL = [command for path in DOCUMENTS for command in commands(str(path.relative_to(ROOT)), path.read_text())]


def test_commands_are_found_where_they_stand():
    assert commands("x.md", EXAMPLE) == [
        Command("x.md", 1, "python one.py"),
        Command("x.md", 1, "make it"),
        Command("x.md", 6, "python two.py   # why"),
        Command("x.md", 7, "A=1 python three.py --id 0"),
        Command("x.md", 10, "cifar-jax four"),
    ]
    assert commands("x.md", EXAMPLE)[2].bare == "python two.py"
    assert [block[:2] for block in blocks(EXAMPLE)] == [("sh", 4), ("python", 14)]


def test_each_is_typed_once_and_processes_of_one_run_together():
    texts = ["a", "JAX_PROCESS_ID=0 b  # here", "JAX_PROCESS_ID=1 b", "c", "a # again", "JAX_PROCESS_ID=0 b", "d"]
    found = steps([Command("x.md", line, text) for line, text in enumerate(texts)])
    assert [[command.line for command in step] for step in found] == [[0], [1, 2], [3], [6]]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_blocks_are_of_the_kinds_that_are_typed_or_shown(path):
    assert {block.language for block in blocks(path.read_text())} <= {"", "sh", "python"}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_is_left_to_be_written(path):
    prose = re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    assert not re.search(r"^[A-Z]{3,}$|TODO|FIXME", prose, re.MULTILINE)


def test_the_list_of_what_is_not_typed_names_what_stands_in_the_documents():
    assert sorted(set(NOT_TYPED) - {command.bare for command in ALL}) == []


def test_make_has_the_targets_and_ci_runs_those_it_is_said_to():
    makefile, ci = ((ROOT / name).read_text() for name in ("Makefile", ".ci/run"))
    for text in {command.bare for command in ALL if command.bare.startswith("make ")}:
        assert re.search(rf"^{text.removeprefix('make ')}:", makefile, re.MULTILINE), text
    for text in [text for text, reason in NOT_TYPED.items() if reason == IN_CI]:
        assert re.search(rf"^\s*{text}$", ci, re.MULTILINE), text


def test_links_of_documents_lead_somewhere():
    for path in DOCUMENTS:
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", path.read_text()):
            assert target.startswith("https://") or (path.parent / target).exists(), (path, target)


@pytest.mark.parametrize(
    "resize",
    [Resize("eval-transform", 64, 73, "bilinear"), Resize("eval-transform", 50, 57, "lanczos"), Resize()],
    ids=str,
)
def test_the_resize_shown_is_that_of_runs(resize):
    page = (ROOT / "docs" / "export.md").read_text()
    (shown,) = [block.text for block in blocks(page) if "def image_of" in block.text]
    names = {}
    exec(shown, names)
    rng = np.random.default_rng(0)
    for width, height in ((500, 375), (99, 301), (64, 64), (77, 1000)):
        photo = Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))
        np.testing.assert_array_equal(np.asarray(names["image_of"](photo, **resize.to_json())), resize(photo))
