"""R-37: every command works in folders with odd names, relative, through links; what is written can be read again."""

from __future__ import annotations

import ast
import html
import json
import re
import shutil
import unicodedata
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import yaml

import burnish
from tests.pipeline.test_run import write_recipe

ODD = "a  ü 日本 'x' \"y\" #1 %41 -lead 😀"
NAMES = {
    "odd": ODD,
    "NFC": unicodedata.normalize("NFC", "é ü が"),
    "NFD": unicodedata.normalize("NFD", "é ü が"),
    "dash": "-lead",
    "200 characters": "n" * 200,
    "signs": "a=b,c [x] {y} $HOME `z` & ; * ? ~ !",
}
FAST = ("odd",)
TABLE = [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in NAMES]


class Place:
    """A folder of an odd name with a model, data and a recipe in it, and commands given there."""

    def __init__(self, server, inputs: Path, root: Path, name: str) -> None:
        self.server, self.name = server, name
        self.folder = root / name
        self.folder.mkdir(parents=True)
        self.inputs = self.folder / name
        shutil.copytree(inputs, self.inputs)
        self.home = root / "home"

    def write(self, **changes: object) -> Path:
        return write_recipe(self.folder, self.inputs, max_steps=2, **changes)

    def say(self, *words: str, status: int = 0, cwd: Path | None = None) -> str:
        """What a command prints."""
        log = self.folder.parent / "log"
        log.unlink(missing_ok=True)
        found = self.server.run(list(words), log=log, cwd=cwd or self.folder, env={"HOME": str(self.home)})
        text = log.read_text()
        assert found == status, f"{words}\n{text[-3000:]}"
        assert "Traceback" not in text
        return text


@pytest.mark.parametrize("name", TABLE)
def test_r37_every_command_in_an_odd_folder(server, inputs, tmp_path, name):
    """R-37: recipe, model, data and output in a folder of such a name: run, again, data, config, runs, report, verbs."""
    place = Place(server, inputs, tmp_path, NAMES[name])
    recipe = str(place.write())
    out = str(place.folder / "runs")
    model, chat = str(place.inputs / "model"), str(place.inputs / "chat.jsonl")
    shown = json.loads(place.say("config", "show", recipe, "--json"))["recipe"]
    assert shown["model"] == model and shown["output_dir"] == out
    assert "not run yet" in place.say("run", recipe, "--dry-run")
    place.say("run", recipe, "--after", f"touch '{place.folder.parent / 'after'}'")
    assert (tmp_path / "after").exists()
    run = place.folder / "runs" / "small"
    assert yaml.safe_load((run / "resolved.yaml").read_text(encoding="utf-8"))["model"] == model
    again = place.folder / "again.yaml"
    shutil.copy(run / "resolved.yaml", again)
    assert place.say("run", str(again)).count("skipped") == 4, "the stored recipe is the same recipe"
    for command in ("check", "show", "stats"):
        place.say("data", command, chat, "--for", "sft", "--model", model)
    assert "small" in place.say("runs", "list", "--output-dir", out)
    assert str(run) in json.loads(place.say("runs", "show", "small", "--output-dir", out, "--json"))["path"]
    place.say("report", str(run))
    check_links(run / "report.html")
    verb = ["sft", "--model", model, "--data", chat, "--output-dir", out, "--max-steps", "2", "--save-steps", "1"]
    place.say(*verb, "--run-name", "v")
    checkpoint = str(place.folder / "runs" / "v" / "01-sft" / "checkpoint-1")
    place.say("sft", "--resume-from", checkpoint, "--output-dir", out, "--run-name", "w")
    place.say("runs", "delete", "v", "--output-dir", out, "--yes", "v")
    assert not (place.folder / "runs" / "v").exists()


def check_links(page: Path) -> None:
    """Every link of the report that is a path leads to something."""
    for found in re.findall(r'(?:href|src)="([^"]+)"', page.read_text(encoding="utf-8")):
        parts = urlsplit(html.unescape(found))
        if not parts.scheme and parts.path:
            assert (page.parent / unquote(parts.path)).exists(), found


@pytest.mark.slow
def test_r37_relative_paths_and_a_linked_home(server, inputs, tmp_path):
    """R-37: paths relative to where the command is given, `~` through a symbolic link, a linked output folder."""
    place = Place(server, inputs, tmp_path, ODD)
    (tmp_path / "real home").mkdir()
    place.home.symlink_to(tmp_path / "real home")
    shutil.copytree(inputs, tmp_path / "real home" / ODD)
    place.write(output_dir="out", model=f"{ODD}/model", stages=[{"kind": "sft", "data": f"./{ODD}/chat.jsonl"}])
    place.say("run", "small.yaml")
    assert (place.folder / "out" / "small" / "01-sft" / "final").is_dir()
    (tmp_path / "elsewhere").mkdir()
    (place.folder / "linked").symlink_to(tmp_path / "elsewhere")
    stages = [{"kind": "sft", "data": f"~/{ODD}/chat.jsonl"}]
    place.write(output_dir="linked", model=f"~/{ODD}/model", stages=stages)
    place.say("run", "small.yaml")
    assert (tmp_path / "elsewhere" / "small" / "01-sft" / "final").is_dir()
    assert "skipped" in place.say("run", f"../{ODD}/small.yaml")
    dash = Place(server, inputs, tmp_path, "-lead")
    dash.write(output_dir="-out", model="-lead/model", stages=[{"kind": "sft", "data": "-lead/chat.jsonl"}])
    dash.say("run", "--output-dir", "-out2", "--", "small.yaml")
    assert (dash.folder / "-out2" / "small" / "run.json").exists()
    dash.say("data", "check", "--for", "sft", "--model", "-lead/model", "--", "-lead/chat.jsonl")


@pytest.mark.slow
def test_r37_long_and_odd_run_and_file_names(server, inputs, tmp_path):
    """R-37: names of 200 bytes for the run and 250 for a data file; what is too long is refused in plain words."""
    place = Place(server, inputs, tmp_path, "d")
    long = place.inputs / ("x" * 244 + ".jsonl")
    shutil.copy(place.inputs / "chat.jsonl", long)
    recipe = str(place.write(stages=[{"kind": "sft", "data": str(long)}]))
    place.say("run", recipe, "--run-name", "n" * 200)
    place.say("run", recipe, "--run-name", "n" * 200, "--fresh")
    place.say("run", recipe, "--run-name", "n" * 201, status=2)
    place.say("runs", "delete", "n" * 200, "--output-dir", str(place.folder / "runs"), "--yes", "n" * 200)
    for name, status in (("s" * 60, 0), ("s" * 61, 2)):
        stages = [{"kind": "sft", "name": name, "data": str(long)}]
        place.say("run", str(place.write(stages=stages)), "--run-name", "t" + str(status), status=status)


def find_shells(source: str) -> list[int]:
    """Lines on which a process could be started through a shell."""
    lines = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            shell = any(k.arg == "shell" and ast.unparse(k.value) != "False" for k in node.keywords)
            if shell or name in ("os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput"):
                lines.append(node.lineno)
    return lines


def test_r37_no_process_is_started_through_a_shell():
    """R-37: no shell=True, os.system or os.popen in the package and the scripts."""
    root = Path(burnish.__file__).parents[2]
    for folder in (Path(burnish.__file__).parent, root / "scripts", root / "benchmarks"):
        for file in sorted(folder.rglob("*.py")):
            assert find_shells(file.read_text(encoding="utf-8")) == [], file
    assert find_shells("subprocess.run('a', shell=True)") and find_shells("os.system('a')")
