"""Settings, run folders, metrics, reports and the light commands load without torch, in a fresh interpreter."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import burnish

SOURCE = Path(burnish.__file__).parent
HEAVY = ("torch", "transformers", "accelerate", "peft", "datasets", "scipy", "matplotlib", "pandas")
LIGHT_COMMANDS = (
    ["--help"],
    ["--version"],
    ["config", "--help"],
    ["runs", "list"],
    ["data", "check", "--help"],
)
CONFIG_COMMANDS = (
    ["config", "schema"],
    ["config", "example", "dpo"],
    ["config", "show", "quickstart"],
    ["config", "recipes"],
    ["config", "reference"],
    ["sft", "--help"],
    ["run", "--help"],
)


def run(code: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=cwd)


def modules_of(package: str) -> list[str]:
    """Names of a package's modules."""
    names = []
    for path in sorted((SOURCE / package).rglob("*.py")):
        parts = path.relative_to(SOURCE).with_suffix("").parts
        names.append(".".join(["burnish", *(part for part in parts if part != "__init__")]))
    return names


@pytest.mark.parametrize("package", ["config", "artifacts", "track", "report", "cli", "data"])
def test_packages_import_without_torch(package: str, tmp_path: Path):
    heavy = HEAVY if package != "report" else tuple(name for name in HEAVY if name != "matplotlib")
    code = f"import sys, importlib\nfor name in {modules_of(package)!r}: importlib.import_module(name)\n"
    code += f"print([name for name in {heavy!r} if name in sys.modules])"
    done = run(code, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("arguments", [*LIGHT_COMMANDS, *CONFIG_COMMANDS], ids=" ".join)
def test_commands_run_without_torch(arguments: list[str], tmp_path: Path):
    code = "import sys\nfrom burnish.cli.main import main\n"
    code += (
        f"status = main({arguments!r})\nprint('LOADED', [n for n in {HEAVY!r} if n in sys.modules])\nsys.exit(status)"
    )
    done = run(code, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("LOADED []")


def test_the_check_can_fail(tmp_path: Path):
    code = "import sys\nfrom burnish.cli.main import main\n"
    code += f"main(['doctor'])\nprint('LOADED', [n for n in {HEAVY!r} if n in sys.modules])"
    assert "'torch'" in run(code, tmp_path).stdout.rpartition("LOADED")[2]


@pytest.mark.parametrize("arguments", LIGHT_COMMANDS, ids=" ".join)
def test_light_commands_load_few_modules(arguments: list[str], tmp_path: Path):
    """They start within half a second where a module takes a millisecond; an interpreter alone has 30 to 40."""
    code = "import sys\nfrom burnish.cli.main import main\n"
    code += f"status = main({arguments!r})\nprint('LOADED', len(sys.modules))\nsys.exit(status)"
    done = run(code, tmp_path)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.rpartition("LOADED")[2]) < 300
