"""The Python files of a folder that transformers loads a model of ours from, without Longhaul.

They are those of `models` that the model needs, found by following imports. transformers follows
relative imports of files side by side, so `from models.ops.conv import x` becomes
`from .ops_conv import x`.
"""

import re
import tomllib
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MODELING, CONFIGURATION = "modeling_longhaul", "configuration_longhaul"
AUTO_MAP = {
    "AutoConfig": f"{CONFIGURATION}.LonghaulConfig",
    "AutoModelForCausalLM": f"{MODELING}.LonghaulForCausalLM",
}
_IMPORT = re.compile(r"^( *)from (models\.[\w.]+) import", re.MULTILINE)
# transformers takes every import outside of `try` for a package that must be there.
_KERNEL = re.compile(r"^( +)(from (?:fla|flash_attn)\b.* import .*)$", re.MULTILINE)


def write_code(folder: Path, *, mixers: Iterable[str]) -> None:
    """mixers: the classes that the model has, by the names in its configuration."""
    project = tomllib.loads((ROOT.parent / "pyproject.toml").read_text())["project"]
    version, licence = project["version"], project["license"]
    targets = dict(target.rsplit(".", 1) for target in sorted(set(mixers)))
    for module, text in _closure(["models.portable.base_longhaul", *targets]).items():
        place = module.replace(".", "/")
        head = f"# {place}.py of Longhaul {version}, {licence}; written with the weights.\n"
        (folder / f"{_flat(module)}.py").write_text(head + text)
    (folder / f"{MODELING}.py").write_text(_modeling(targets, f"{version}, {licence}"))


def _closure(modules: Iterable[str]) -> dict[str, str]:
    """These modules and all that they import of ours, rewritten."""
    found: dict[str, str] = {}
    waiting = list(modules)
    while waiting:
        module = waiting.pop()
        if module in found:
            continue
        text = (ROOT.parent / f"{module.replace('.', '/')}.py").read_text()
        waiting += [name for _, name in _IMPORT.findall(text)]
        text = _IMPORT.sub(lambda match: f"{match[1]}from .{_flat(match[2])} import", text)
        found[module] = _KERNEL.sub(r"\1try:\n\1    \2\n\1except ImportError:\n\1    raise", text)
    return found


def _flat(module: str) -> str:
    return module.removeprefix("models.").removeprefix("portable.").replace(".", "_")


def _modeling(targets: dict[str, str], origin: str) -> str:
    imports = [f"from .{_flat(module)} import {name}" for module, name in targets.items()]
    classes = [f'        "{module}.{name}": {name},' for module, name in targets.items()]
    lines = [
        f'"""Written by Longhaul {origin}: the model of this folder."""',
        "",
        "from .base_longhaul import LonghaulModel",
        *imports,
        "",
        "",
        "class LonghaulForCausalLM(LonghaulModel):",
        "    classes = {",
        *classes,
        "    }",
        "",
    ]
    return "\n".join(lines)
