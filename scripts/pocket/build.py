"""Rebuild pocket: its data sets, its tokenizer, its base models and the note of where they come from.

.venv/bin/python scripts/pocket/build.py [--only data tokenizer models] [--out DIR] [--threads N] [--steps N]
"""

import argparse
import dataclasses
import json
import platform
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

from pocket import corpus, datasets, provenance, tokenizing  # noqa: E402

PARTS = ("data", "tokenizer", "models")


def read_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Rebuild the pocket models and data.")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="the parts to rebuild")
    parser.add_argument("--models", nargs="+", help="the models to train, by name; all where not given")
    parser.add_argument("--out", type=Path, default=ROOT / "src" / "burnish" / "assets", help="where to write")
    parser.add_argument("--threads", type=int, default=1, help="threads to train with")
    parser.add_argument("--steps", type=int, help="train for so many steps rather than as the recipe says")
    return parser.parse_args()


def build_tokenizer(documents: list[str], models: Path) -> None:
    """Train the tokenizer and write it beside every model."""
    from pocket.pretraining import RECIPES

    tokenizer = tokenizing.train_tokenizer(documents + corpus.make_talk())
    for recipe in RECIPES:
        tokenizing.save_tokenizer(tokenizer, models / recipe.name)


def build_models(documents: list[str], arguments: argparse.Namespace) -> dict[str, Any]:
    """Pretrain the base models."""
    import torch
    from tokenizers import Tokenizer

    from pocket.pretraining import RECIPES, pack, pretrain

    torch.set_num_threads(arguments.threads)
    torch.use_deterministic_algorithms(True)
    report: dict[str, Any] = {}
    for recipe in RECIPES:
        if arguments.models and recipe.name not in arguments.models:
            continue
        folder = arguments.out / "models" / recipe.name
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        rows = pack(documents, tokenizer)
        chosen = dataclasses.replace(recipe, steps=arguments.steps) if arguments.steps else recipe
        report[recipe.name] = pretrain(chosen, tokenizer, rows, folder) | {"corpus_tokens": rows.numel()}
        report[recipe.name] |= {"threads": arguments.threads, "torch": str(torch.__version__)}
    return report


def main() -> None:
    """Rebuild what was asked for."""
    arguments = read_arguments()
    out: Path = arguments.out
    documents = corpus.make_corpus()
    note = provenance.read(out)
    note["python"] = platform.python_version()
    note["corpus"] = {
        "documents": len(documents),
        "characters": sum(len(document) for document in documents),
        "seed": corpus.CORPUS_SEED,
    }
    if "data" in arguments.only:
        note["data"] = {"rows": datasets.write_datasets(out / "data" / "pocket"), "seeds": datasets.SEEDS}
    if "tokenizer" in arguments.only:
        build_tokenizer(documents, out / "models")
    if "models" in arguments.only:
        note.setdefault("models", {}).update(build_models(documents, arguments))
    provenance.write(out, note)
    print(json.dumps(note, indent=2))


if __name__ == "__main__":
    main()
