"""What a source's name means, its splits, its bytes' hash."""

from pathlib import Path

import pytest

from burnish.config.data import DataSource
from burnish.data.problems import ProblemLog
from burnish.data.slices import Split
from burnish.data.sources import as_sources, resolve_source
from burnish.errors import BurnishError, DataError
from tests.data.toys import write_lines


def find(text: str, **settings: object):
    return resolve_source(DataSource(source=text, **settings))  # type: ignore[arg-type]


def test_files_folders_and_globs(tmp_path: Path) -> None:
    for name in ("train.jsonl", "train-00001.jsonl.gz", "test.jsonl", "validation/x.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_lines(tmp_path / name, [{"text": name}])
    (tmp_path / "README.md").write_text("words")
    (tmp_path / "dataset_info.json").write_text("{}")
    file = find(str(tmp_path / "train.jsonl"))
    assert (file.name, file.held_out, list(file.files)) == ("train", None, ["train"])
    folder = find(str(tmp_path))
    assert {split: len(files) for split, files in folder.files.items()} == {"train": 2, "test": 1, "validation": 1}
    assert folder.held_out == "test"
    assert find(str(tmp_path), split="validation").held_out is None
    rows = list(folder.rows(Split("train"), ProblemLog()))
    assert [row.data["text"] for row in rows] == ["train-00001.jsonl.gz", "train.jsonl"]
    pattern = find(str(tmp_path / "tr*.jsonl"))
    assert len(pattern.files["train"]) == 1
    assert len(find(str(tmp_path / "**" / "*.jsonl")).files["train"]) == 3


def test_a_folder_without_split_names_is_all_train(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.jsonl"):
        write_lines(tmp_path / name, [{"text": name}])
    source = find(str(tmp_path))
    assert len(source.files["train"]) == 2 and source.held_out is None


def test_a_local_path_comes_before_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "name").mkdir(parents=True)
    write_lines(tmp_path / "owner" / "name" / "train.jsonl", [{"text": "local"}])
    source = find("owner/name")
    assert source.hub is None and [r.data["text"] for r in source.rows(source.split, ProblemLog())] == ["local"]


@pytest.mark.parametrize("name", ["nothing.jsonl", "./nothing", "/nowhere/at/all", "a/b/c"])
def test_paths_that_are_not_there(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_lines(tmp_path / "nothings.jsonl", [{"text": "x"}])
    with pytest.raises(DataError) as caught:
        find(name)
    assert caught.value.where == name
    if name == "nothing.jsonl":
        assert "did you mean nothings.jsonl?" in caught.value.remedy


def test_d04_wrong_endings_empty_folders_and_patterns(tmp_path: Path) -> None:
    (tmp_path / "a.xlsx").write_text("x")
    (tmp_path / "empty").mkdir()
    for name, words in (("a.xlsx", ".xlsx is not known"), ("empty", "no data file"), ("*.csv", "no file matches")):
        with pytest.raises(DataError) as caught:
            find(str(tmp_path / name))
        assert words in caught.value.message and ".jsonl, .json" in caught.value.message


def test_missing_splits_are_named(tmp_path: Path) -> None:
    write_lines(tmp_path / "test.jsonl", [{"text": "x"}])
    with pytest.raises(DataError, match="there are test"):
        find(str(tmp_path), split="train[:5]")
    assert find(str(tmp_path)).split.name == "test"


def test_the_hub_is_not_asked_in_vain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(DataError, match="no such file") as caught:
        find("pocket/prefrences")
    assert "pocket/preferences" in caught.value.remedy
    with pytest.raises(BurnishError) as other:
        find("nobody-at-all/no-such-set-here")
    assert other.value.remedy


def test_saved_datasets_are_read(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    made = datasets.DatasetDict(
        {name: datasets.Dataset.from_list([{"text": f"{name} {i}"} for i in range(4)]) for name in ("train", "test")}
    )
    made.save_to_disk(str(tmp_path / "saved"))
    source = find(str(tmp_path / "saved"), split="train[1:3]")
    rows = list(source.rows(source.split, ProblemLog()))
    assert [(row.line, row.data["text"]) for row in rows] == [(2, "train 1"), (3, "train 2")]
    assert source.held_out == "test" and source.fingerprint(source.split)


def test_the_fingerprint_follows_bytes_and_slice(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    write_lines(path, [{"text": "x"}])
    first = find(str(path))
    again = find(str(path))
    assert first.fingerprint(first.split) == again.fingerprint(again.split)
    sliced = find(str(path), split="train[:1]")
    assert sliced.fingerprint(sliced.split) != first.fingerprint(first.split)
    write_lines(path, [{"text": "y"}])
    changed = find(str(path))
    assert changed.fingerprint(changed.split) != first.fingerprint(first.split)


def test_strings_mean_sources() -> None:
    assert as_sources(None) == []
    assert as_sources("a") == [DataSource(source="a")]
    assert as_sources(["a", DataSource(source="b", weight=2.0)])[1].weight == 2.0
