"""Settings of data sources."""

from __future__ import annotations

from typing import Literal

from burnish.config.base import Settings, setting


class DataSource(Settings):
    """One source of rows: a file, a folder, a bundled set or a hub data set. A plain string means `source`."""

    source: str = setting(
        ..., "File, folder, glob, bundled set (pocket/chat) or hub id; an existing local path comes first."
    )
    subset: str | None = setting(None, "Configuration name or data_dir of a hub data set (harmless-base).")
    split: str | None = setting(None, "Split and slice: train, train[:5%], test[100:200]. Default: train.")
    weight: float = setting(1.0, "Share of this source in a mixture, relative to the others.", gt=0)
    max_samples: int | None = setting(None, "Use at most this many rows (a seeded sample).", ge=1)
    columns: dict[str, str] | str | None = setting(
        None, "Mapping from burnish's column to the file's (prompt: question), or the name of a bundled mapping."
    )
    format: str = setting("auto", "Row format; auto recognises it (see `burnish data check`).")
    name: str | None = setting(None, "Name of the source in metrics; default: the last part of `source`.")


Truncation = Literal["skip", "keep_start", "keep_end"]
TrainOn = Literal["auto", "assistant", "last", "all"]


class DataSettings(Settings):
    """How rows become tokens; shared by every stage that reads data."""

    data: str | DataSource | list[str | DataSource] | None = setting(
        None, "Training data: a source or a mixture of sources."
    )
    eval_data: str | DataSource | list[str | DataSource] | None = setting(
        None, "Held-out data; default: the source's own test split if it has one, else `validation_split` of `data`."
    )
    validation_split: float = setting(
        0.0, "Share of `data` held out for evaluation, by prompt; 0 = none is cut off.", ge=0, lt=1
    )
    max_eval_samples: int | None = setting(None, "Evaluate on at most this many held-out rows.", ge=1)
    slice_share: float | None = setting(
        None,
        "Use this share of the source's prompts; stages with disjoint [offset, offset + share) never share a prompt.",
        gt=0,
        le=1,
    )
    slice_offset: float = setting(0.0, "Where the slice begins, as a share of the source (by prompt).", ge=0, lt=1)
    max_samples: int | None = setting(None, "Use at most this many training rows (a seeded sample).", ge=1)
    flip_share: float = setting(
        0.0,
        "Label noise for studies: share of training pairs whose chosen and rejected are swapped (of labelled rows: whose "
        "label is turned). Held-out rows never are.",
        ge=0,
        le=1,
    )
    columns: dict[str, str] | str | None = setting(None, "Column mapping for all sources that have none of their own.")
    chat_template: str | None = setting(
        None, "Chat template: a file, or a template text; default: the tokenizer's own, else burnish's plain one."
    )
    chat_template_kwargs: dict[str, str | int | float | bool] = setting({}, "Extra variables for the chat template.")
    train_on: TrainOn = setting(
        "auto", "Which tokens SFT trains on: auto (completion or assistant turns), assistant, last (turn), all."
    )
    strip_think: bool = setting(False, "Remove <think>…</think> blocks from answers.")
    max_length: int | None = setting(None, "Tokens of prompt + completion at most; default: the model's context.", ge=2)
    max_prompt_length: int | None = setting(None, "Tokens of the prompt at most.", ge=1)
    max_completion_length: int | None = setting(None, "Tokens of a completion at most.", ge=1)
    truncation: Truncation = setting(
        "skip", "Rows over the limit: skip (left out and counted), keep_start or keep_end (cut, EOS kept, counted)."
    )
    on_error: Literal["raise", "skip"] = setting(
        "raise", "Malformed rows: raise, or skip (left out, counted and named)."
    )
    strip_control: bool = setting(
        False, "Remove NUL and other control characters from texts instead of refusing the row."
    )
    drop_identical: bool = setting(
        False, "Leave out pairs whose chosen and rejected are equal instead of refusing them."
    )
    add_eos: bool = setting(True, "End each answer that is not rendered by a chat template with the EOS token.")
