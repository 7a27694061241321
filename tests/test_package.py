"""The package as a whole: what importing it loads, which way its imports go, what its public names say."""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest

import collage

SOURCE = Path(collage.__file__).parent
# Lower floors first; a module may import its own floor and those before it.
FLOORS = (
    ("numerics",),
    ("storage",),
    ("kernels",),
    ("optim",),
    ("metrics",),
    ("train", "integrations"),
    ("bench", "report", "plan", "cli"),
)
LEVEL = {name: level for level, names in enumerate(FLOORS) for name in names}
# May import anything: the entry points.
ENTRIES = {"__init__", "__main__"}
BELOW_TRAIN = [name for names in FLOORS[:5] for name in names]
MODULES = sorted(SOURCE.rglob("*.py"))


def name_of(path: Path) -> str:
    """``train.loop`` for src/collage/train/loop.py."""
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def floor_of(path: Path) -> str:
    return path.relative_to(SOURCE).with_suffix("").parts[0]


def imports_of(source: str) -> set[str]:
    """Absolute dotted names of everything a source imports, at whatever depth; relative imports are not used here."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            if node.module == "collage":
                found |= {f"collage.{alias.name}" for alias in node.names}
            else:
                found.add(str(node.module))
    return found


def own_floors(imports: set[str]) -> set[str]:
    """The floors among them. A public name of ``collage`` counts as the floor that defines it."""
    floors = set()
    for name in imports:
        package, _, rest = name.partition(".")
        if package != "collage" or not rest:
            continue
        floor = rest.split(".")[0]
        if floor not in LEVEL and hasattr(collage, floor):
            module = getattr(getattr(collage, floor), "__module__", None) or f"collage.{floor}"
            floor = module.split(".")[1]
        floors.add(floor)
    return floors


def upward(floor: str, imports: set[str]) -> list[str]:
    """The floors that a module of ``floor`` must not import and does."""
    return sorted(f for f in own_floors(imports) if f != floor and f in LEVEL and LEVEL[f] >= LEVEL[floor])


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_go_down_only(path: Path) -> None:
    floor = floor_of(path)
    if floor in ENTRIES or floor == "version":
        return
    assert floor in LEVEL, f"{floor} stands on no floor: give it a row in FLOORS"
    imports = imports_of(path.read_text())
    if LEVEL[floor] < LEVEL["cli"]:
        assert not upward(floor, imports)
    else:
        # cli joins the others of the top floor; they may use train and below.
        assert "cli" not in own_floors(imports) or floor == "cli"
    if LEVEL[floor] < LEVEL["train"]:
        assert "collage" not in imports, "importing the whole package from inside it goes up"


@pytest.mark.parametrize(
    ("source", "wrong"),
    [
        ("import collage.kernels", ["kernels"]),
        ("def f():\n    from collage.optim.adamw import AdamW", ["optim"]),
        ("from collage import AdamW", ["optim"]),
        ("from collage.numerics import FP32\nimport torch, math", []),
    ],
)
def test_the_walk_finds_an_import_that_goes_up(source: str, wrong: list[str]) -> None:
    assert upward("storage", imports_of(source)) == wrong


@pytest.mark.parametrize("path", [p for p in MODULES if floor_of(p) in BELOW_TRAIN], ids=name_of)
def test_the_lower_floors_import_torch_and_the_standard_library_alone_and_one_kernel_triton(path: Path) -> None:
    roots = {name.split(".")[0] for name in imports_of(path.read_text())}
    allowed = {*sys.stdlib_module_names, "torch", "collage"}
    assert roots <= (allowed | {"triton"} if name_of(path).startswith("kernels.fused.") else allowed)


def loaded_by(statement: str) -> set[str]:
    """Top-level modules in a fresh interpreter after a statement."""
    code = f"import json, sys\n{statement}\nprint(json.dumps(sorted({{name.split('.')[0] for name in sys.modules}})))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout))


def test_importing_collage_loads_nothing_heavy_beyond_torch() -> None:
    beyond = loaded_by("import collage") - loaded_by("import torch") - {"collage"}
    assert beyond <= set(sys.stdlib_module_names)


def test_importing_collage_loads_no_upper_floor() -> None:
    code = "import sys, collage\nprint(*sorted(n for n in sys.modules if n.startswith('collage.')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    floors = {name.split(".")[1] for name in done.stdout.split()}
    assert floors == {*BELOW_TRAIN, "version"}


def test_importing_collage_leaves_torchs_global_state_alone() -> None:
    state = "torch.get_default_dtype(), torch.get_num_threads(), torch.get_rng_state().sum().item()"
    code = f"import torch\nbefore = {state}\nimport collage\nassert before == ({state}), before"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", [name for name in collage.__all__ if name != "__version__"])
def test_public_names_exist_and_have_docstrings_of_their_own(name: str) -> None:
    value = getattr(collage, name)
    doc = value.__doc__ or ""
    assert doc.strip()
    if inspect.isclass(value):
        assert not doc.startswith(f"{name}("), "a dataclass's generated signature is no docstring"
        methods = [m for key, m in vars(value).items() if inspect.isfunction(m) and not key.startswith("_")]
        assert all(method.__doc__ for method in methods)


def test_public_names_are_sorted_and_complete() -> None:
    assert sorted(collage.__all__) == collage.__all__
    public = {n for n in vars(collage) if not n.startswith("_") and n not in (*LEVEL, "version")}
    assert public == {n for n in collage.__all__ if not n.startswith("_")}


@pytest.mark.parametrize("name", BELOW_TRAIN)
def test_the_public_names_of_a_floor_exist(name: str) -> None:
    floor = importlib.import_module(f"collage.{name}")
    for public in floor.__all__:
        assert getattr(floor, public) is not None


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_every_module_says_what_it_is_for(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text()))


def test_the_version_is_that_of_the_distribution() -> None:
    assert importlib.metadata.version("torch-collage") == collage.__version__


def test_no_two_files_of_tests_have_one_name() -> None:
    """The tests' folders are no packages: of two files of one name pytest and the workers' imports would find one."""
    names = sorted(path.name for path in Path(__file__).parent.rglob("*.py") if path.name != "conftest.py")
    assert [name for name in set(names) if names.count(name) > 1] == []
