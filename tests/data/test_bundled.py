"""What the package carries."""

import pytest

from burnish.data.bundled import list_data, list_models, resolve_data, resolve_model


@pytest.mark.parametrize("name", ["", ".", "..", "../models", "a/../b", "nothing", "/etc", "pocket/nothing"])
def test_names_that_are_none(name: str) -> None:
    assert resolve_model(name) is None
    assert resolve_data(name) is None


def test_every_listed_name_resolves() -> None:
    for name in list_models():
        folder = resolve_model(name)
        assert folder is not None and (folder / "config.json").is_file()
    for name in list_data():
        folder = resolve_data(name)
        assert folder is not None and (folder / "train.jsonl.gz").is_file()
