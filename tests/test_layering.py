"""Import order (the trail): a module imports only from earlier ones; optional packages stay in their parts."""

import ast
import sys
from functools import cache
from pathlib import Path

import pytest

import dat_ref

ROOT = Path(dat_ref.__file__).parent
# A package comes after its modules, because its __init__ imports them.
TRAIL = [
    "_checks", "_deprecation", "conventions", "config", "presets", "params", "official",
    "ops", "ops.basic", "ops.grid", "ops.offsets", "ops.sampling", "ops.coverage", "ops.bias", "ops.attention", "layer",
    "peers.memory", "peers.attention", "peers.deformable",
    "peers.window", "peers.neighborhood", "peers.mhsa", "peers.deform_conv", "peers.multi_scale",
    "peers.ms_deform_attn", "peers.ms_deform_layer", "peers.pyramid", "peers.per_query", "peers.dat_dcn",
    "peers.registry", "peers.matching", "peers.receptive_field", "peers",
    "block", "backbone", "initialization",
]  # fmt: skip
CORE_PACKAGES = {"numpy", "scipy"}
# Parts that may import an optional package at import time.
PARTS = {
    "torch": (
        "torch",
        "bench",
        "complexity.torch_counter",
    ),
    "triton": ("torch",),
    "matplotlib": ("viz",),
    "PIL": ("viz", "data"),
    "hypothesis": ("testing",),
}


@cache
def modules():
    """Return every module of the package by its name inside it, with its path."""
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(part for part in parts if part != "__init__")] = path
    return found


def imports(source, name, is_package, *, everywhere=True):
    """Return the full names of a module's imports (of this package, of others); of its top level if not `everywhere`.

    ``from . import official`` names the module `official`; ``from .params import count`` names `params`.
    """
    package = name.split(".") if is_package else name.split(".")[:-1]
    package = [part for part in package if part]
    ours, others = set(), set()
    tree = ast.parse(source)
    for node in ast.walk(tree) if everywhere else tree.body:
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [node.module]
            if node.module == "dat_ref":
                names = [f"dat_ref.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1]
            whole = [*base, *(node.module.split(".") if node.module else [])]
            full = [".".join([*whole, alias.name]) for alias in node.names]
            known = modules()
            ours.update(one if one in known else ".".join(whole) for one in full)
            continue
        else:
            continue
        for one in names:
            if one.split(".")[0] == "dat_ref":
                ours.add(one.partition(".")[2])
            else:
                others.add(one)
    return ours, others


def backward_imports(name, imported):
    """Return the imports of a module of the trail that are not before it."""
    before = TRAIL[: TRAIL.index(name)]
    return sorted(one for one in imported if one not in before)


CORE = [name for name in modules() if name in TRAIL]


def test_the_trail_is_all_there():
    """Every module named in the trail exists, and every module of its folders is in it."""
    assert set(TRAIL) == set(CORE)
    assert {name for name in modules() if name.split(".")[0] in ("ops", "peers")} <= set(TRAIL)


@pytest.mark.parametrize("name", CORE)
def test_no_module_imports_backwards(name):
    """A module of the trail imports only from earlier modules of the trail."""
    path = modules()[name]
    ours, _ = imports(path.read_text(encoding="utf-8"), name, path.name == "__init__.py")
    assert backward_imports(name, ours) == []


@pytest.mark.parametrize("name", CORE)
def test_the_core_needs_numpy_and_scipy_only(name):
    """The NumPy part imports only numpy, scipy and the standard library."""
    path = modules()[name]
    _, others = imports(path.read_text(encoding="utf-8"), name, path.name == "__init__.py")
    assert {one.split(".")[0] for one in others} <= CORE_PACKAGES | sys.stdlib_module_names


@pytest.mark.parametrize("package", PARTS)
def test_optional_packages_stay_in_their_parts(package):
    """torch, matplotlib, PIL and hypothesis are imported at the top level only in the parts that need them."""
    for name, path in modules().items():
        _, others = imports(path.read_text(encoding="utf-8"), name, path.name == "__init__.py", everywhere=False)
        if not any(f"{name}.".startswith(f"{part}.") for part in PARTS[package]):
            assert package not in {one.split(".")[0] for one in others}, f"{name} imports {package}"


def test_the_package_itself_imports_the_core_only():
    """`import dat_ref` needs neither torch nor matplotlib: its __init__ imports only from the trail."""
    ours, others = imports((ROOT / "__init__.py").read_text(encoding="utf-8"), "", True)
    assert ours - {""} <= set(TRAIL)
    assert not {one.split(".")[0] for one in others} - sys.stdlib_module_names


@pytest.mark.parametrize(
    ("name", "source", "expected"),
    [
        ("ops.grid", "from ..layer import deformable_layer", ["layer"]),
        ("ops.grid", "from .sampling import bilinear_sample", ["ops.sampling"]),
        ("ops.grid", "from . import basic, bias", ["ops.bias"]),
        ("config", "from . import presets", ["presets"]),
        ("config", "from .presets import config", ["presets"]),
        ("layer", "import dat_ref.block", ["block"]),
        ("layer", "from dat_ref import backbone", ["backbone"]),
        ("layer", "def late():\n    from .block import block", ["block"]),
        ("layer", "from . import __version__", [""]),
        ("peers.window", "from .neighborhood import axis_neighbors", ["peers.neighborhood"]),
        ("layer", "from .layer import deformable_layer", ["layer"]),
        ("backbone", "from .viz import figures", ["viz.figures"]),
        ("backbone", "from .ops.basic import linear\nimport numpy as np\nfrom . import official", []),
    ],
)
def test_checker_sees_backward_imports(name, source, expected):
    """The checker detects backward imports in every form and accepts a forward one."""
    ours, _ = imports(source, name, False)
    assert backward_imports(name, ours) == expected


def test_checker_sees_foreign_packages():
    """A foreign package is detected at any depth; with `everywhere=False` only at the top level."""
    source = "import numpy\ndef late():\n    import torch.nn"
    assert imports(source, "layer", False)[1] == {"numpy", "torch.nn"}
    assert imports(source, "layer", False, everywhere=False)[1] == {"numpy"}
