"""The cache of tokenised groups: the same groups back, or made again; bounded; never a pickle."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from burnish.config.data import DataSource
from burnish.config.stages import CpoSettings, OrpoSettings, SimpoSettings
from burnish.core.group import Group
from burnish.data import cache
from burnish.data.cache import build_key, list_entries, load_entry, save_entry
from burnish.data.prepare import PreparedData, find_data_key, prepare_data
from burnish.disk import cache_root
from tests.data.toys import chat_folder, chat_tokenizer, dpo, pair, plain_tokenizer, reward, sft, write_lines


def equal(a: list[Group], b: list[Group]) -> bool:
    def flat(groups: list[Group]) -> list[object]:
        return [
            (
                g.id,
                dict(g.columns),
                dict(g.tags),
                g.prompt.tolist(),
                [(c.ids.tolist(), c.mask.tolist()) for c in g.completions],
            )
            for g in groups
        ]

    return flat(a) == flat(b)


def prepared(tmp_path: Path, **settings: object) -> PreparedData:
    file = tmp_path / "a.jsonl"
    if not file.exists():
        write_lines(file, [pair(i) for i in range(12)])
    return prepare_data(
        dpo(str(file), validation_split=0.25, **settings), plain_tokenizer(), cache_dir=tmp_path / "cache"
    )


def test_a_second_call_takes_the_same_groups_from_the_cache(tmp_path: Path) -> None:
    first, second = prepared(tmp_path), prepared(tmp_path)
    assert not first.report.from_cache and second.report.from_cache
    assert equal(first.train, second.train) and equal(first.held_out, second.held_out)
    assert (first.fingerprint, first.example, first.end_ids) == (second.fingerprint, second.example, second.end_ids)
    assert first.report.to_json() == second.report.to_json()
    assert second.train[0].prompt.dtype == np.int32 and second.train[0].completions[0].mask.dtype == np.bool_
    assert len(list_entries(tmp_path / "cache" / "data")) == 1


def test_everything_that_matters_makes_a_new_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_lines(tmp_path / "a.jsonl", [pair(i) for i in range(12)])
    folder = tmp_path / "cache"

    def count() -> int:
        return len(list_entries(folder / "data"))

    prepare_data(dpo(file), plain_tokenizer(), cache_dir=folder)
    changes = [
        (dpo(file, max_length=300), plain_tokenizer()),
        (dpo(file, seed=1, validation_split=0.5), plain_tokenizer()),
        (dpo(file, add_eos=False), plain_tokenizer()),
        (dpo(file), chat_tokenizer()),
        (dpo(file, chat_template="{{ messages }}"), plain_tokenizer()),
        (reward(file), plain_tokenizer()),
        (sft(file), plain_tokenizer()),
    ]
    for n, (settings, tokenizer) in enumerate(changes, 2):
        prepare_data(settings, tokenizer, cache_dir=folder)
        assert count() == n
    prepare_data(dpo(file), plain_tokenizer(), context=200, cache_dir=folder)
    assert count() == 9
    prepare_data(dpo(file, learning_rate=3e-4, name="other"), plain_tokenizer(), cache_dir=folder)
    assert count() == 9, "what does not touch the data makes no new entry"
    write_lines(tmp_path / "a.jsonl", [pair(i, chosen=" changed") for i in range(12)])
    assert not prepare_data(dpo(file), plain_tokenizer(), cache_dir=folder).report.from_cache
    monkeypatch.setattr(cache, "code_version", lambda: "another")
    assert not prepare_data(dpo(file), plain_tokenizer(), cache_dir=folder).report.from_cache


@pytest.mark.parametrize("kind", [CpoSettings, OrpoSettings, SimpoSettings])
def test_kinds_that_read_pairs_share_an_entry(tmp_path: Path, kind: type) -> None:
    file, folder = write_lines(tmp_path / "a.jsonl", [pair(i) for i in range(12)]), tmp_path / "cache"
    first = prepare_data(dpo(file), plain_tokenizer(), cache_dir=folder)
    again = prepare_data(kind(data=file), plain_tokenizer(), cache_dir=folder)
    assert again.report.from_cache and equal(first.train, again.train)
    assert len(list_entries(folder / "data")) == 1


SEEDED: dict[str, dict[str, Any]] = {
    "a held-out share": {"validation_split": 0.5},
    "a sample": {"max_samples": 5},
    "a sample of one source": {},
    "held-out rows": {"max_eval_samples": 2},
    "a mixture": {},
    "flipped labels": {"flip_share": 0.5},
}


@pytest.mark.parametrize("name", ["nothing", *SEEDED])
def test_the_seed_is_part_of_the_key_exactly_where_rows_are_drawn(tmp_path: Path, name: str) -> None:
    """Where it is not, the groups really are the same; where it is, they really are others."""
    (tmp_path / "b").mkdir()
    one = write_lines(tmp_path / "a.jsonl", [pair(i) for i in range(12)])
    test = write_lines(tmp_path / "b" / "test.jsonl", [pair(i) for i in range(20, 30)])
    other = write_lines(tmp_path / "b" / "train.jsonl", [pair(i) for i in range(40, 60)])
    data: Any = one
    if name == "a sample of one source":
        data = [DataSource(source=one, max_samples=5)]
    elif name == "held-out rows":
        data = str(Path(test).parent)
    elif name == "a mixture":
        data = [DataSource(source=one, weight=3.0), DataSource(source=other)]
    keys, groups = set(), []
    for seed in (1, 2):
        settings = dpo(data, seed=seed, **SEEDED.get(name, {}))
        keys.add(find_data_key(settings, plain_tokenizer()))
        made = prepare_data(settings, plain_tokenizer(), cache_dir=tmp_path / f"cache-{seed}")
        assert not made.report.from_cache
        groups.append(made)
    same = equal(groups[0].train, groups[1].train) and equal(groups[0].held_out, groups[1].held_out)
    assert (len(keys) == 1) == same == (name == "nothing")


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "zeros", "json", "other"])
def test_a_damaged_entry_is_made_again(tmp_path: Path, damage: str) -> None:
    first = prepared(tmp_path)
    (entry,) = list_entries(tmp_path / "cache" / "data")
    data = bytearray(entry.path.read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 0xFF
    elif damage == "other":
        np.savez(entry.path, ids=np.zeros(3))
        data = bytearray(entry.path.read_bytes())
    else:
        data = {"cut": data[:-200], "empty": b"", "zeros": bytes(len(data)), "json": b'{"a": 1}'}[damage]
    entry.path.write_bytes(data)
    again = prepared(tmp_path)
    assert not again.report.from_cache and equal(first.train, again.train)
    assert prepared(tmp_path).report.from_cache


def test_r27_no_pickle_is_ever_read(tmp_path: Path) -> None:
    canary = tmp_path / "canary"

    class Evil:
        def __reduce__(self):
            return (os.system, (f"touch {canary}",))

    prepared(tmp_path)
    (entry,) = list_entries(tmp_path / "cache" / "data")
    np.savez(
        entry.path, ids=np.array([Evil()], dtype=object), mask=np.zeros(1), described=np.zeros(1), allow_pickle=True
    )
    assert not prepared(tmp_path).report.from_cache
    assert not canary.exists()


def test_the_oldest_entries_go_first(tmp_path: Path) -> None:
    group = Group("a", np.arange(1, 1000, dtype=np.int32), ())
    for n in range(4):
        save_entry(tmp_path, build_key({"n": n}), [[group]], {})
        os.utime(tmp_path / f"{build_key({'n': n})}.npz", (n, n))
    size = list_entries(tmp_path)[0].size
    assert load_entry(tmp_path, build_key({"n": 0})) is not None, "use makes an entry young"
    save_entry(tmp_path, build_key({"n": 9}), [[group]], {}, limit=3 * size + 10)
    kept = {entry.key for entry in list_entries(tmp_path)}
    assert kept == {build_key({"n": n}) for n in (0, 3, 9)}
    save_entry(tmp_path, build_key({"n": 10}), [[group]], {}, limit=1)
    assert {entry.key for entry in list_entries(tmp_path)} == {build_key({"n": 10})}, "the new entry always stays"


def test_an_interrupted_write_leaves_no_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", fail)
    made = prepared(tmp_path)
    assert any("not cached" in note and "No space left" in note for note in made.report.notes)
    assert not list((tmp_path / "cache" / "data").iterdir())


def test_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BURNISH_CACHE", str(tmp_path / "here"))
    assert cache_root() == tmp_path / "here"
    monkeypatch.setenv("BURNISH_CACHE", "off")
    assert cache_root() is None
    file = write_lines(tmp_path / "a.jsonl", [pair(1)])
    assert prepare_data(dpo(file), plain_tokenizer()).train
    monkeypatch.delenv("BURNISH_CACHE")
    assert cache_root() == Path.home() / ".cache" / "burnish"
    assert Path(chat_folder()).is_dir()
