"""Who may import whom: the rules that keep models free of clusters and configurations."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("models", "parallel", "trainer")
KERNELS = ("fla", "flash_attn", "triton")
CONFIGURATION = ("hydra", "omegaconf")
SEAM = ("models.sequence", "models.ops", "models.precision", "models.transition")  # for `parallel`
ENTRY = ("trainer/main.py", "trainer/build.py")
MAX_LINES = 400


def imports(path: Path) -> Iterator[str]:
    """Full names of all that a file imports, wherever in the file it does."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def within(name: str, *modules: str) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def allowed(file: str, name: str) -> bool:
    package = file.split("/")[0]
    if within(name, *KERNELS):
        return file.startswith("models/ops/")
    if within(name, *CONFIGURATION):
        return file in ENTRY
    if package == "models":
        return not within(name, "torch.distributed", "parallel", "trainer")
    if package == "parallel":
        ours = within(name, *PACKAGES)
        return not ours or within(name, "parallel", *SEAM)
    return True


FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_follow_the_rules(path):
    file = path.relative_to(ROOT).as_posix()
    assert [name for name in imports(path) if not allowed(file, name)] == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_are_short(path):
    assert len(path.read_text().splitlines()) <= MAX_LINES


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("models/moe.py", "torch.distributed"),
        ("models/moe.py", "parallel.mesh.Mesh"),
        ("models/moe.py", "fla.ops"),
        ("parallel/ring.py", "models.moe.Router"),
        ("parallel/ring.py", "trainer.batch.Batch"),
        ("trainer/loop.py", "omegaconf.OmegaConf"),
        ("trainer/loop.py", "triton"),
    ],
)
def test_the_rules_forbid(file, name):
    assert not allowed(file, name)
