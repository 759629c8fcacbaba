"""The layout of the house, read from the imports of all files: no circle, at most eight layers, and
nobody imports what stands above them.
"""

import ast
import functools
from pathlib import Path

import pytest
from conftest import ROOT

FILES = [*ROOT.glob("*.py"), *ROOT.glob("mostgan/**/*.py"), *ROOT.glob("kernels/*.py")]
# Side commands, in order.
SIDE = ("mostgan.prepare", "mostgan.checkpoint.", "mostgan.metrics", "mostgan.figures")
# Saving and loading the training state is the core's, though it lies in checkpoint/.
CORE_PARTS = ("mostgan.checkpoint.training",)
LAYERS = 8  # from config.py up to train.py


def name_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in FILES}


@functools.cache
def imports(module):
    """The project's modules that a module imports when it is imported itself: not those in its
    functions.
    """
    found, body = set(), list(ast.parse(Path(MODULES[module]).read_text()).body)
    while body:
        node = body.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = "mostgan" if node.level else node.module
            base = f"{base}.{node.module}" if node.level and node.module else base
            whole = {f"{base}.{alias.name}" for alias in node.names}
            found |= whole if whole <= MODULES.keys() else {base, *whole}
        elif isinstance(node, (ast.If, ast.Try, ast.With)):
            body += node.body
    return {name for name in found if name in MODULES and name != module}


def depth(module, below=()):
    assert module not in below, f"a circle: {' → '.join([*below, module])}"
    return 1 + max((depth(other, (*below, module)) for other in imports(module)), default=0)


def is_side(module):
    return module.startswith(SIDE) and module not in CORE_PARTS


def layers(module):
    """How many files of mostgan, one on another, a module stands on, with itself."""
    below = (other for other in imports(module) if not other.startswith("kernels"))
    return 1 + max(map(layers, below), default=0)


def test_no_circles_and_few_layers():
    for module in MODULES:
        depth(module)
    assert layers("train") <= LAYERS


def test_kernels_know_nothing_of_mostgan():
    for module in MODULES:
        if module.split(".")[0] == "kernels":
            assert not [name for name in imports(module) if name.startswith("mostgan")], module


def test_the_core_imports_no_side_command():
    for module in MODULES:
        if module.startswith("mostgan.") and not is_side(module):
            assert not [name for name in imports(module) if is_side(name)], module


def test_side_commands_import_what_stands_before_them():
    for module in filter(is_side, MODULES):
        place = next(i for i, side in enumerate(SIDE) if module.startswith(side))
        above = SIDE[place + 1 :]
        assert not [name for name in imports(module) if name.startswith(above)], module


@pytest.mark.parametrize("unwanted", ["files", "data", "rendering", "run", "video"])
def test_the_model_knows_nothing_of_clips_or_rendering(unwanted):
    seen, todo = set(), ["mostgan.model"]
    while todo:
        seen.add(module := todo.pop())
        todo += imports(module) - seen
    assert f"mostgan.{unwanted}" not in seen
