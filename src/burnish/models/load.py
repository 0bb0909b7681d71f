"""Loading models: what may be loaded, in which type, what of it trains; and a clear word where it may not.

Only safetensors is read, code from a model's repository runs only when `trust_remote_code` is set, and the global
random state is the same after loading as before.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
)
from transformers.utils import logging as hf_logging

from burnish.config.train import TrainSettings
from burnish.data import bundled
from burnish.errors import ConfigError, ServiceError
from burnish.models.adapters import (
    attach_adapter,
    base_of,
    build_lora,
    check_joinable,
    find_head_parameters,
    merge_adapter,
    seeded,
)
from burnish.models.dropout import disable_dropout as switch_off_dropout
from burnish.models.folder import CONVERT, ModelFolder, find_adapter_base, inspect_model_folder, read_json
from burnish.models.freeze import cast_trainable, compute_share, find_no_decay, freeze_all_but_top, untie_embeddings
from burnish.models.quantise import Quantization, check_dora, choose_quantization, quantise_base
from burnish.models.reward_head import (
    PadToken,
    check_reward_support,
    choose_pad_token,
    derive_seed,
    find_score,
    init_score_head,
    set_pad_token,
)

Head = Literal["lm", "score"]

DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken"]
_HUB_ID = re.compile(r"^[\w][\w.-]*(/[\w][\w.-]*)?$")


@dataclass
class LoadedFrom:
    """Where a model came from.

    Attributes:
        name: What a script would write to load the base model: a hub id or an absolute folder.
        revision: Revision of a hub model.
        folder: The folder that was asked for (of an adapter: the adapter's).
        base: The folder whose weights were loaded (without an adapter: `folder`).
        kind: What was asked for: "lm", "score" or "adapter".
        dtype: The type the weights are stored in.
        merged: An adapter was added to the weights, so they differ from those of `base`.
        quantization: The linear layers are stored in few bits; a merged adapter then lies beside them, exact.
        fresh_head: The score head is new.
        dropout: Dropout settings of the configuration that were set to 0, with their values.
        pad: Padding token of a reward model.
        notes: Sentences for the user.
    """

    name: str
    revision: str | None
    folder: Path
    base: Path
    kind: str
    dtype: torch.dtype
    merged: bool = False
    quantization: Quantization | None = None
    fresh_head: bool = False
    dropout: dict[str, float] = field(default_factory=dict)
    pad: PadToken | None = None
    notes: list[str] = field(default_factory=list)


@dataclass
class BuiltModel:
    """A model ready to train.

    Attributes:
        model: A PreTrainedModel, or a PeftModel around one.
        head: "lm" or "score".
        trainable: name → parameter, sorted by name; a tied parameter once.
        notes: Sentences for the user, the trainable share among them.
        fresh_adapter: LoRA, and the adapter is new: the model with its adapter off is the one this stage received.
        share: Trainable share of the parameters, 0 … 1.
        head_parameters: Names of a reward model's head.
        no_decay: Names that weight decay leaves alone (norms, biases).
        loaded: Where it came from.
    """

    model: nn.Module
    head: Head
    trainable: dict[str, nn.Parameter]
    notes: list[str]
    fresh_adapter: bool
    share: float
    head_parameters: frozenset[str]
    no_decay: frozenset[str]
    loaded: LoadedFrom


def resolve_model_path(name: str, *, revision: str | None = None) -> str:
    """What a model's name means: a bundled model, an existing local folder (as an absolute path), or a hub id.

    Raises:
        ConfigError: None of these.
    """
    local = bundled.resolve_model(name) or Path(name).expanduser()
    if local.exists():
        if revision is not None:
            raise ConfigError(
                f"revision {revision!r} has no meaning for a local model",
                where="revision",
                found=revision,
                remedy="remove revision, or give a hub id as model",
            )
        return str(local.resolve())
    if _HUB_ID.match(name):
        return name
    parent = local.parent
    near = difflib.get_close_matches(local.name, [p.name for p in parent.iterdir()] if parent.is_dir() else [], n=1)
    raise ConfigError(
        f"there is no model {name!r}: no such folder",
        where="model",
        found=name,
        remedy=f"did you mean {parent / near[0]}?" if near else "give a folder, a bundled model or a hub id",
    )


def fetch_model_folder(path: str, *, revision: str | None = None, trust_remote_code: bool = False) -> Path:
    """The local folder of a resolved model: itself, or the hub's snapshot without pickles (offline: the cached one)."""
    if Path(path).is_dir():
        return Path(path)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    patterns = [*HUB_FILES, "*.py"] if trust_remote_code else HUB_FILES
    try:
        folder = Path(snapshot_download(path, revision=revision, allow_patterns=patterns, ignore_patterns=["*/*"]))
    except LocalEntryNotFoundError:
        near = difflib.get_close_matches(path, bundled.list_models(), n=1)
        hint = f"did you mean the bundled model {near[0]}? Else " if near else ""
        raise ServiceError(
            f"model {path!r} is neither a local folder nor in the cache, and the hub cannot be reached",
            where="model",
            found=path,
            remedy=f"{hint}run once with a connection, which fetches it, or give a local folder",
        ) from None
    except HfHubHTTPError as e:
        raise ServiceError(
            f"the hub does not give {path!r}: {str(e).splitlines()[0]}",
            where="model",
            found=path,
            remedy="check the name and revision; private models need HF_TOKEN",
        ) from None
    except OSError as e:
        raise ServiceError(
            f"model {path!r} cannot be fetched: {e}", where="model", found=path, remedy="check the network and the disk"
        ) from None
    if not any(folder.glob("*.safetensors")):
        raise ConfigError(
            f"model {path!r} has no safetensors weights on the hub, and pickled ones are not read",
            where="model",
            found=path,
            remedy=f"use a revision that has them, or {CONVERT}",
        )
    return folder


@contextmanager
def quiet() -> Iterator[None]:
    """Neither load reports nor bars: what matters is checked and said by burnish."""
    level, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(level)
        if bars:
            hf_logging.enable_progress_bar()


def load_model(
    path: str,
    *,
    head: Head,
    dtype: torch.dtype,
    seed: int = 0,
    head_init_std: float = 0.02,
    revision: str | None = None,
    trust_remote_code: bool = False,
    disable_dropout: bool = False,
    need_trained_head: bool = False,
    quantization: Quantization | None = None,
    attach: bool = False,
) -> tuple[PreTrainedModel, LoadedFrom]:
    """Load a model folder, hub id or PEFT folder (base + adapter, added to the weights) as language or reward model.

    Args:
        path: As `resolve_model_path` gave it.
        head: "lm": a language model. "score": a reward model; made from a language model it gets a fresh head.
        dtype: Type of all its weights.
        seed, head_init_std: Of a fresh head.
        disable_dropout: Set every dropout of the configuration to 0 (functional dropout too).
        need_trained_head: Refuse to make a reward model from a language model.
        quantization: Store the linear layers in few bits; `dtype` is that of the rest.
        attach: Leave an adapter beside the weights, as it was trained; over a quantised base nothing else is exact.
    """
    asked = inspect_model_folder(fetch_model_folder(path, revision=revision, trust_remote_code=trust_remote_code))
    base, name = asked, str(asked.path) if Path(path).is_dir() else path
    if asked.kind == "adapter":
        name = resolve_model_path(find_adapter_base(asked.path, asked.config))
        base = inspect_model_folder(fetch_model_folder(name, revision=asked.config.get("revision")))
        revision = asked.config.get("revision")
        if base.kind == "adapter":
            raise ConfigError(
                "the base of this adapter is an adapter itself",
                where=str(asked.path),
                found=name,
                remedy="merge the two first, and give the merged model",
            )
    has_head = (asked.config.get("task_type") == "SEQ_CLS") if asked.kind == "adapter" else asked.kind == "score"
    _check_head(asked, head, has_head=has_head, need_trained=need_trained_head)
    source = LoadedFrom(
        name=name,
        revision=revision,
        folder=asked.path,
        base=base.path,
        kind=asked.kind,
        dtype=DTYPES.get(base.dtype, torch.float32),
        fresh_head=head == "score" and not has_head,
    )
    load_dtype = torch.promote_types(dtype, torch.float32) if asked.kind == "adapter" else dtype
    if quantization is not None:  # as stored: then the weights stay in the mapped file until each is quantised
        load_dtype = source.dtype
    model = _load_weights(base, source, head=head, dtype=load_dtype, trust=trust_remote_code)
    if head == "score":
        _finish_reward_model(model, source, seed=seed, std=head_init_std, trust=trust_remote_code)
    beneath = asked.path if asked.kind == "adapter" and not attach else None
    if quantization is not None:
        quantise_base(model, quantization, earlier=beneath)
        source.quantization = quantization
    elif beneath is not None:
        model = merge_adapter(model, beneath)
    if beneath is not None:
        source.merged = True
        source.notes.append(f"adapter {asked.path} added to the weights of {name}")
    elif asked.kind == "adapter":
        model = base_of(attach_adapter(model, asked.path))
    _own_weights(model, dtype)
    if disable_dropout:
        source.dropout = find_rates(model.config.to_dict())
        switch_off_dropout(model)
    return model, source


def _own_weights(model: nn.Module, dtype: torch.dtype) -> None:
    """Copy the weights out of the mapped file: training would else write into pages of it, at its alignment, and a
    change of the file would reach the model. Not `model.to(dtype)`: that would round the rotary tables too."""
    for parameter in model.parameters():
        if parameter.is_floating_point():  # packed weights are copies already
            parameter.data = parameter.data.to(dtype, copy=True, memory_format=torch.contiguous_format)


def _check_head(asked: ModelFolder, head: Head, *, has_head: bool, need_trained: bool) -> None:
    if head == "lm" and has_head:
        raise ConfigError(
            "this is a reward model; a language model is needed here",
            where=str(asked.path),
            found=asked.config.get("architectures") or asked.config.get("task_type"),
            remedy="give the language model it was trained from (init_from: a stage of kind sft or dpo)",
        )
    if head == "score" and need_trained and not has_head:
        raise ConfigError(
            "this is a language model without a trained score head; a reward model is needed here",
            where=str(asked.path),
            found=asked.config.get("architectures") or asked.config.get("task_type"),
            remedy="give the result of a stage of kind reward",
        )
    labels = asked.config.get("num_labels") or len(asked.config.get("id2label") or {}) or 2
    if asked.kind == "score" and labels != 1:
        raise ConfigError(
            f"this classifier has {labels} outputs; a reward model has one",
            where=str(asked.path),
            found=labels,
            remedy="give a reward model with num_labels 1",
        )


def _load_config(folder: ModelFolder, trust: bool) -> Any:
    needs_code = "auto_map" in folder.config
    if needs_code and not trust:
        raise ConfigError(
            "this model brings its own code, which burnish does not run",
            where=str(folder.path),
            found=folder.config["auto_map"],
            remedy="read that code; if you trust it, set trust_remote_code: true",
        )
    kernel = find_foreign_kernel(folder.config)
    if kernel and not trust:
        raise ConfigError(
            f"this model asks for {kernel}, code from elsewhere, which burnish does not run",
            where=str(folder.path / "config.json"),
            found=kernel,
            remedy="remove that key from config.json",
        )
    if "quantization_config" in folder.config:
        raise ConfigError(
            "these weights are quantised and cannot be trained or merged as they are",
            where=str(folder.path),
            remedy="give the model's unquantised weights",
        )
    try:
        return AutoConfig.from_pretrained(str(folder.path), trust_remote_code=trust, local_files_only=True)
    except (ValueError, KeyError) as e:
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

        name = str(folder.config.get("model_type"))
        near = difflib.get_close_matches(name, list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES), n=3)
        hint = f"; the nearest that it knows: {', '.join(near)}" if near else ""
        raise ConfigError(
            f"transformers cannot read the configuration (model_type {name!r}): {str(e).splitlines()[0][:200]}",
            where=str(folder.path / "config.json"),
            found=name,
            remedy=f"use an architecture that transformers has{hint}",
        ) from None


def find_foreign_kernel(fields: Mapping[str, Any]) -> str:
    """A repository that a configuration names as its implementation of attention or experts; "" if it names none."""
    for key, value in fields.items():
        if isinstance(value, dict) and (found := find_foreign_kernel(value)):
            return found
        if "implementation" in key and isinstance(value, str) and "/" in value:
            return f"{key}: {value}"
    return ""


def _load_weights(
    folder: ModelFolder, source: LoadedFrom, *, head: Head, dtype: torch.dtype, trust: bool
) -> PreTrainedModel:
    if head == "score":
        check_reward_support(folder.config, str(folder.path))
    config = _load_config(folder, trust)
    auto: Any = AutoModelForCausalLM if head == "lm" else AutoModelForSequenceClassification
    if head == "score":
        config.num_labels = 1
    with quiet(), seeded(0):
        try:
            model, info = auto.from_pretrained(
                str(folder.path),
                config=config,
                dtype=dtype,
                use_safetensors=True,
                trust_remote_code=trust,
                local_files_only=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
        except (ValueError, OSError, RuntimeError, KeyError) as e:
            raise ConfigError(
                f"the model cannot be loaded: {str(e).splitlines()[0][:300]}",
                where=str(folder.path),
                remedy="check that the folder is complete and its configuration right",
            ) from e
    new_head = head == "score" and folder.kind != "score"
    missing = sorted(n for n in info["missing_keys"] if not (new_head and n.startswith("score.")))
    wrong = missing or sorted(k if isinstance(k, str) else str(k[0]) for k in info["mismatched_keys"])
    if wrong:
        what = "are missing" if missing else "have another shape than the configuration says"
        raise ConfigError(
            f"{len(wrong)} weights {what} (first: {wrong[0]})",
            where=str(folder.path),
            found=wrong[:8],
            remedy="fetch or export the model again; config.json and weights differ",
        )
    return model


def find_rates(fields: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Every dropout rate above 0 in a configuration's fields, nested parts as "text_config.attention_dropout"."""
    found: dict[str, float] = {}
    for key, value in fields.items():
        if isinstance(value, dict):
            found |= find_rates(value, f"{prefix}{key}.")
        elif isinstance(value, float) and value > 0 and "drop" in key.lower():
            found[prefix + key] = value
    return found


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> Any | None:
    """The transformers tokenizer of a model folder, or None where it has none."""
    if not any(
        (folder / n).is_file() for n in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
    ):
        return None
    with quiet():
        try:
            return AutoTokenizer.from_pretrained(
                str(folder), trust_remote_code=trust_remote_code, local_files_only=True
            )
        except (ValueError, OSError, KeyError, TypeError) as e:
            raise ConfigError(
                f"the tokenizer cannot be loaded: {str(e).splitlines()[0][:200]}",
                where=str(folder),
                remedy="fetch the model again; code of its own needs trust_remote_code: true",
            ) from None


def _finish_reward_model(model: PreTrainedModel, source: LoadedFrom, *, seed: int, std: float, trust: bool) -> None:
    find_score(model)
    if source.fresh_head:
        init_score_head(model, seed=seed, std=std)
        source.notes.append(f"new score head: N(0, {std}²), seed {seed}")
    folders = dict.fromkeys((source.folder, source.base))
    file = next((f / "generation_config.json" for f in folders if (f / "generation_config.json").is_file()), None)
    tokenizer = next((t for f in folders if (t := load_tokenizer(f, trust_remote_code=trust)) is not None), None)
    source.pad = choose_pad_token(model, tokenizer, read_json(file) if file else None)
    set_pad_token(model, source.pad)
    if source.pad.changes_tokenizer:
        source.notes.append(
            f"padding token of the reward model: {source.pad.token} (id {source.pad.id}); the tokenizer's own is no pad"
        )


def load_causal_lm(path: str, *, dtype: torch.dtype, settings: Any = None) -> PreTrainedModel:
    """Load a language model; `settings` may carry revision and trust_remote_code."""
    return load_model(
        path,
        head="lm",
        dtype=dtype,
        revision=getattr(settings, "revision", None),
        trust_remote_code=getattr(settings, "trust_remote_code", False),
    )[0]


def load_reward_model(
    path: str, *, dtype: torch.dtype, seed: int = 0, head_init_std: float = 0.02, need_trained_head: bool = False
) -> PreTrainedModel:
    """Load a reward model: its own head if it has one, else (unless refused) a fresh one."""
    return load_model(
        path, head="score", dtype=dtype, seed=seed, head_init_std=head_init_std, need_trained_head=need_trained_head
    )[0]


def find_frozen_dtype(s: TrainSettings, stored: torch.dtype, compute: torch.dtype, masters: torch.dtype) -> torch.dtype:
    """The type of what does not train. Under an adapter: the compute type. Under top_k, where frozen weights are
    exported as well: the compute type if that loses nothing, else the masters'. fp16 only where it is stored so."""
    if compute not in (torch.bfloat16, torch.float16):
        return masters
    if stored == compute or (s.lora is not None and compute == torch.bfloat16):
        return compute
    return masters


def build_model(
    settings: TrainSettings,
    path: str,
    *,
    head: Head,
    seed: int,
    dtype_masters: torch.dtype = torch.float32,
    compute_dtype: torch.dtype | None = None,
) -> BuiltModel:
    """Load a model and decide what of it trains: everything, the top blocks, or a fresh adapter.

    Args:
        path: As `resolve_model_path` gave it.
        seed: Of a fresh adapter and a fresh score head.
        dtype_masters: Type of the trainable parameters.
        compute_dtype: Type of the forward pass (None = as the masters); the frozen part stays in it where possible.
    """
    compute, partly = compute_dtype or dtype_masters, settings.lora is not None or bool(settings.top_k)
    load_dtype = dtype_masters
    if partly:
        fetched = fetch_model_folder(path, revision=settings.revision, trust_remote_code=settings.trust_remote_code)
        stored = inspect_model_folder(fetched).dtype
        load_dtype = find_frozen_dtype(settings, DTYPES.get(stored, torch.float32), compute, dtype_masters)
    model, loaded = load_model(
        path,
        head=head,
        dtype=load_dtype,
        seed=seed,
        head_init_std=getattr(settings, "head_init_std", 0.02),
        revision=settings.revision,
        trust_remote_code=settings.trust_remote_code,
        disable_dropout=getattr(settings, "disable_dropout", False),
        quantization=choose_quantization(settings),
    )
    notes = [*loaded.notes]
    if loaded.dropout:
        notes.append("dropout off: " + ", ".join(f"{k} {v:g} → 0" for k, v in sorted(loaded.dropout.items())))
    if settings.untie_embeddings:
        notes += untie_embeddings(model)
    trained: nn.Module = model
    if settings.lora is not None:
        check_joinable(settings.lora, quantised=loaded.quantization is not None, merged=loaded.merged)
        trained = build_lora(model, settings.lora, head=head, seed=derive_seed(seed, "adapter"))
        if loaded.quantization is not None and settings.lora.use_dora:
            check_dora(trained)
    else:
        notes += freeze_all_but_top(model, settings.top_k or 0, head=head)
    cast_trainable(trained, dtype_masters)
    if settings.gradient_checkpointing:
        enable_checkpointing(trained)
    trainable = {n: p for n, p in sorted(trained.named_parameters()) if p.requires_grad}
    share = compute_share(trained)
    return BuiltModel(
        model=trained,
        head=head,
        trainable=trainable,
        notes=[*notes, str(share)],
        fresh_adapter=settings.lora is not None,
        share=share.value,
        head_parameters=find_head_parameters(trained) if head == "score" else frozenset(),
        no_decay=find_no_decay(trained, list(trainable)),
        loaded=loaded,
    )


def enable_checkpointing(model: nn.Module) -> None:
    """Recompute activations in backward; the numbers are the same as without."""
    base = base_of(model)
    try:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    except ValueError:
        raise ConfigError(
            f"{type(base).__name__} does not support gradient checkpointing",
            where="gradient_checkpointing",
            remedy="set gradient_checkpointing: false",
        ) from None
