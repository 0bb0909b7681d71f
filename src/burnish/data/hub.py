"""Hub data sets and folders written by `save_to_disk`, through `datasets` (imported when needed)."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from burnish.data.readers import Row
from burnish.data.slices import Split
from burnish.errors import BurnishError, DataError, ServiceError


@lru_cache(maxsize=8)
def _load(repo: str, subset: str | None) -> Any:
    """The splits of a hub data set or a saved one; `subset` is a configuration's name or a data_dir."""
    import datasets
    from datasets.exceptions import DatasetNotFoundError

    if Path(repo).expanduser().is_dir():
        saved = datasets.load_from_disk(str(Path(repo).expanduser()))
        return saved if isinstance(saved, datasets.DatasetDict) else {"train": saved}
    try:
        if subset is None:
            return datasets.load_dataset(repo)
        try:
            names = datasets.get_dataset_config_names(repo)
        except Exception:  # a folder of data files has no configurations to list
            names = []
        if subset in names:
            return datasets.load_dataset(repo, subset)
        return datasets.load_dataset(repo, data_dir=subset)
    except DatasetNotFoundError as error:
        raise DataError(
            f"neither a local path nor a data set on the hub: {str(error)[:200]}",
            where=repo,
            remedy="check the spelling; a gated set needs `hf auth login`",
        ) from error
    except BurnishError:
        raise
    except (ConnectionError, OSError) as error:
        raise _describe_silence(repo, error) from error
    except ValueError as error:
        raise DataError(
            f"the hub data set cannot be read: {str(error)[:300]}", where=repo, remedy="set data.subset"
        ) from error


def _describe_silence(text: str, error: BaseException) -> ServiceError:
    """The hub did not answer."""
    return ServiceError(
        f"this is no local path, and the hub cannot be asked: {str(error)[:200]}",
        where=text,
        remedy="check the spelling of the path; for a hub data set go online once, or download it and give the folder",
    )


def hub_splits(repo: str, subset: str | None) -> list[str]:
    """Names of its splits."""
    return list(_load(repo, subset))


def read_hub(repo: str, subset: str | None, split: Split) -> Iterator[Row]:
    """Rows of a split; the line is the row's number."""
    table = _load(repo, subset)[split.name]
    start, stop = split.span(len(table))
    for i in range(start, len(table) if stop is None else min(stop, len(table))):
        yield Row(f"{repo}/{split.name}", i + 1, table[i])


def hub_fingerprint(repo: str, subset: str | None, split: Split) -> str:
    """What names the content of a split."""
    table = _load(repo, subset)[split.name]
    return f"{repo}:{subset}:{split.name}:{table._fingerprint}:{len(table)}"
