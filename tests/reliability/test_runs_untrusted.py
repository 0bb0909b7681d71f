"""R-27: files from strangers run no code: no unpickler is reached, no module of theirs imported, no template escapes."""

from __future__ import annotations

import ast
import json
import pickle
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import burnish
from burnish.cli.main import main
from burnish.core.kernels.build import load_kernels
from tests.waiting import bounded

EVENTS: list[tuple[str, tuple]] = []
WATCHING = [False]


def _hook(event: str, arguments: tuple) -> None:
    program = event == "subprocess.Popen" and arguments[0] != "uname"  # Python's own platform module asks it
    if WATCHING[0] and (event in ("pickle.find_class", "os.system") or program):
        EVENTS.append((event, arguments))


@pytest.fixture(scope="module", autouse=True)
def _audit() -> None:
    sys.addaudithook(_hook)


@pytest.fixture
def watch() -> Iterator[list[tuple[str, tuple]]]:
    """Unpickling and processes started while a test runs; the kernels' compiler, once a process, has run before."""
    load_kernels()
    EVENTS.clear()
    WATCHING[0] = True
    yield EVENTS
    WATCHING[0] = False


class Canary:
    """Unpickling this creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


class Case:
    """A model folder, data, and the place of the canary."""

    def __init__(self, inputs: Path, folder: Path) -> None:
        self.folder = folder
        self.model, self.data = folder / "model", folder / "chat.jsonl"
        shutil.copytree(inputs / "model", self.model)
        shutil.copy(inputs / "chat.jsonl", self.data)
        self.canary = folder / "canary"
        self.pickle = pickle.dumps(Canary(self.canary))
        self.code = f"from pathlib import Path\nPath({str(self.canary)!r}).touch()\nEvil = object\n"
        self.more: list[str] = []

    def edit(self, name: str, **changes: object) -> None:
        file = self.model / name
        fields = json.loads(file.read_text()) if file.exists() else {}
        file.write_text(json.dumps(fields | changes))

    def run(self) -> int:
        words = ["sft", "--model", str(self.model), "--data", str(self.data), "--output-dir", str(self.folder)]
        return main([*words, "--run-name", "run", "--max-steps", "1", "--batch-size", "2", *self.more])


def pickled_weights(case: Case) -> None:
    (case.model / "model.safetensors").unlink()
    (case.model / "pytorch_model.bin").write_bytes(case.pickle)


def pickles_beside(case: Case) -> None:
    names = (
        "pytorch_model.bin",
        "training_info.pt",
        "optimizer.pt",
        "rng_state.pth",
        "scheduler.pt",
        "tokenizer.pkl",
        "training_args.bin",
        "model.ckpt",
    )
    for name in names:
        (case.model / name).write_bytes(case.pickle)


def lying_header(case: Case) -> None:
    file = case.model / "model.safetensors"
    file.write_bytes((2**60).to_bytes(8, "little") + file.read_bytes()[8:])


def model_code(case: Case) -> None:
    case.edit("config.json", auto_map={"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"})
    (case.model / "evil.py").write_text(case.code)


def tokenizer_code(case: Case) -> None:
    case.edit("tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Evil", "evil.Evil"]}, tokenizer_class="Evil")
    (case.model / "evil.py").write_text(case.code)


def slow_tokenizer_code(case: Case) -> None:
    tokenizer_code(case)
    (case.model / "tokenizer.json").unlink()
    (case.model / "vocab.json").write_text("{}")


def foreign_kernel(case: Case) -> None:
    case.edit("config.json", attn_implementation="evil/kernel")


def index_outside(case: Case) -> None:
    (case.model / "model.safetensors").unlink()
    case.edit("model.safetensors.index.json", weight_map={"a": "../canary.safetensors"})


def adapter_module(case: Case) -> None:
    base = case.folder / "base"
    case.model.rename(base)
    case.model.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(base / name, case.model / name)
    fields = {"peft_type": "LORA", "base_model_name_or_path": str(base), "r": 2, "target_modules": ["q_proj"]}
    fields |= {"megatron_config": {"a": 1}, "megatron_core": "evil", "task_type": "CAUSAL_LM"}
    case.edit("adapter_config.json", **fields)
    from safetensors.torch import save_file

    save_file({}, case.model / "adapter_model.safetensors")
    Path("evil.py").write_text(case.code)


def pickled_adapter(case: Case) -> None:
    adapter_module(case)
    case.edit("adapter_config.json", megatron_config=None)
    (case.model / "adapter_model.safetensors").unlink()
    (case.model / "adapter_model.bin").write_bytes(case.pickle)


def template(source: str) -> Callable[[Case], None]:
    def change(case: Case) -> None:
        (case.model / "chat_template.jinja").write_text(source.replace("CANARY", str(case.canary)))

    return change


def deep_config(case: Case) -> None:
    (case.model / "config.json").write_text('{"a":' * 100_000)


def data_named(name: str) -> Callable[[Case], None]:
    def change(case: Case) -> None:
        case.data = case.folder / name
        case.data.write_bytes(case.pickle)

    return change


def loading_script(case: Case) -> None:
    case.data = case.folder / "set"
    case.data.mkdir()
    (case.data / "set.py").write_text(case.code)


def pickled_checkpoint(case: Case) -> None:
    place = case.folder / "checkpoint-1"
    place.mkdir()
    for name in ("optimizer.pt", "pytorch_model.bin", "model.safetensors", "state.json"):
        (place / name).write_bytes(case.pickle)
    case.more = ["--resume-from", str(place)]


REFUSED: dict[str, tuple[Callable[[Case], None], str]] = {
    "pickled weights": (pickled_weights, "pickled"),
    "lying header": (lying_header, "header claims"),
    "code of the model": (model_code, "brings its own code"),
    "code of a slow tokenizer": (slow_tokenizer_code, "tokenizer"),
    "foreign kernel": (foreign_kernel, "code from elsewhere"),
    "index outside": (index_outside, "no safetensors file of this folder"),
    "adapter with a module": (adapter_module, "code from elsewhere"),
    "pickled adapter": (pickled_adapter, "pickled"),
    "template that starts a program": (
        template("{{ cycler.__init__.__globals__.os.system('touch CANARY') }}"),
        "template",
    ),
    "template that reads classes": (template("{{ ''.__class__.__mro__[1].__subclasses__()[0]() }}"), "template"),
    "template that changes its input": (template("{{ messages.append(messages[0]) }}"), "template"),
    "template without end": (
        template("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"),
        "template",
    ),
    "template without end, by itself": (template("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"), "template"),
    "huge template": (template("{{ 'a' * 10**10 }}"), "template"),
    "configuration without end": (deep_config, "config.json"),
    "pickle as jsonl": (data_named("data.jsonl"), "data.jsonl"),
    "pickle as parquet": (data_named("data.parquet"), "data.parquet"),
    "pickle as pickle": (data_named("data.pkl"), "data.pkl"),
    "pickle as tensors": (data_named("data.pt"), "data.pt"),
    "loading script": (loading_script, "set"),
    "pickled checkpoint": (pickled_checkpoint, "checkpoint-1"),
}
FAST = ("pickled weights", "code of the model", "template that starts a program", "pickle as parquet")
TABLE = [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in REFUSED]


@pytest.fixture
def case(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Case:
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    monkeypatch.syspath_prepend(str(tmp_path / "cwd"))  # as `python -m burnish` has it
    return Case(inputs, tmp_path)


@pytest.mark.parametrize("name", TABLE)
def test_r27_hostile_files_are_refused(case, watch, name, capfd):
    """R-27: one clear message, no unpickling, no code of theirs, no endless work."""
    change, words = REFUSED[name]
    change(case)
    with bounded():
        status = case.run()
    text = capfd.readouterr().err
    assert status in (2, 5), text
    assert words in text and "→" in text and "Traceback" not in text, text
    assert not case.canary.exists()
    assert watch == []
    assert not (case.folder / "run" / "01-sft" / "final").exists()


@pytest.mark.parametrize("change", [pickles_beside, tokenizer_code])
def test_r27_what_is_not_needed_is_not_touched(case, watch, change, capfd):
    """R-27: pickles beside good weights, and code beside a plain tokenizer: the run ends well without them."""
    change(case)
    assert case.run() == 0, capfd.readouterr().err
    assert not case.canary.exists()
    assert watch == []


def test_r27_the_audit_sees_an_unpickler(watch):
    pickle.loads(pickle.dumps(Path))
    assert [event for event, _ in watch] == ["pickle.find_class"]


FORBIDDEN = {
    "pickle",
    "cPickle",
    "dill",
    "cloudpickle",
    "joblib",
    "shelve",
    "marshal",
}


def find_unpicklers(source: str) -> list[str]:
    """Modules and calls that can run code from a file."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [a.name for a in node.names if a.name.split(".")[0] in FORBIDDEN]
        elif isinstance(node, ast.ImportFrom):
            found += [node.module for _ in [0] if node.module and node.module.split(".")[0] in FORBIDDEN]
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name in ("torch.load", "yaml.load", "eval", "exec", "pd.read_pickle"):
                found.append(name)
            if name == "np.load" and "allow_pickle=False" not in ast.unparse(node):
                found.append(name)
    return found


def test_r27_no_unpickler_in_the_package():
    """R-27: neither torch.load nor pickle, marshal, eval, unsafe YAML; but what the processes of one run tell one another."""
    root = Path(burnish.__file__).parent
    between_processes = {root / "engine" / "runtime.py", root / "engine" / "parallel" / "structure.py"}
    for file in sorted({*root.rglob("*.py")} - between_processes):
        assert find_unpicklers(file.read_text(encoding="utf-8")) == [], file
    assert find_unpicklers("import pickle") and find_unpicklers("torch.load(x)") and find_unpicklers("np.load(x)")
