"""The note of where the bundled models and data come from, for machines and for people."""

import hashlib
import importlib.metadata
import json
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "transformers", "tokenizers", "safetensors")


def read(assets: Path) -> dict[str, Any]:
    """The note as it was last written, or the beginning of one."""
    path = assets / "provenance.json"
    if path.exists():
        note = json.loads(path.read_text(encoding="utf-8"))
        assert isinstance(note, dict)
        return note
    return {
        "name": "pocket",
        "licence": "MIT",
        "made_by": "the burnish authors",
        "made_with": "scripts/pocket/build.py",
    }


def digest(path: Path) -> str:
    """The SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write(assets: Path, note: dict[str, Any]) -> None:
    """Write `provenance.json` and `PROVENANCE.md`."""
    note["versions"] = {package: importlib.metadata.version(package) for package in PACKAGES}
    kept = sorted(path for path in assets.rglob("*") if path.suffix in (".gz", ".safetensors", ".json", ".jinja"))
    files = [path for path in kept if path.name != "provenance.json"]
    note["files"] = {
        path.relative_to(assets).as_posix(): {"bytes": path.stat().st_size, "sha256": digest(path)} for path in files
    }
    (assets / "provenance.json").write_text(json.dumps(note, indent=2) + "\n", encoding="utf-8")
    (assets / "PROVENANCE.md").write_text(describe(note), encoding="utf-8")


def describe(note: dict[str, Any]) -> str:
    """The note in words."""
    lines = [
        "# Where pocket comes from",
        "",
        "Everything below this folder was made by `scripts/pocket/build.py` of this repository. The text is generated",
        "by the grammars under `scripts/pocket`: nothing in it was copied from anywhere, and the people and towns are",
        "invented. The models were pretrained from scratch on that text. Licence: MIT, as the rest of burnish.",
        "",
        f"- corpus: {note['corpus']['documents']:,} documents, {note['corpus']['characters']:,} characters,"
        f" seed {note['corpus']['seed']}",
    ]
    for name, model in note.get("models", {}).items():
        lines.append(
            f"- model `{name}`: {model['parameters']:,} parameters (Qwen3 architecture, tied embeddings, bfloat16),"
            f" {model['corpus_tokens']:,} tokens of text, {model['tokens_trained']:,} trained on in"
            f" {model['steps']:,} steps of {model['batch']} rows, AdamW {model['learning_rate']:g} with a cosine,"
            f" seed {model['seed']},"
            f" {model['seconds']:,.0f} s on {model['threads']} thread(s), held-out loss {model['held_out_loss']:.3f}"
        )
    data = note.get("data", {})
    for name, counts in data.get("rows", {}).items():
        seed = data["seeds"][name]
        lines.append(f"- data set `{name}`: {counts['train']:,} train and {counts['test']:,} test rows, seed {seed}")
    versions = ", ".join(f"{package} {version}" for package, version in note["versions"].items())
    lines += [f"- versions: Python {note['python']}, {versions}", "", "| file | bytes | SHA-256 |", "|---|---|---|"]
    lines += [f"| `{name}` | {file['bytes']:,} | `{file['sha256'][:16]}…` |" for name, file in note["files"].items()]
    return "\n".join(lines) + "\n"
