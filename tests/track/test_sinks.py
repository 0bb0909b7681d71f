"""TensorBoard and W&B: S1-15, and one that fails does not stop training."""

import builtins
import logging
import math
import sys
import types
from pathlib import Path

import pytest

from burnish.artifacts.redact import redact
from burnish.errors import UsageError
from burnish.track.sinks import SinkContext, Sinks, build_sinks


@pytest.fixture
def warnings(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("burnish"), "propagate", True)
    caplog.set_level(logging.WARNING, "burnish")
    return caplog


def context(folder: Path, **kw) -> SinkContext:
    return SinkContext(folder, run="quick", stage="01-sft", run_id="abc", redact=redact, **kw)


def make_wandb(fail_online: bool = False) -> types.ModuleType:
    """A stand-in for the wandb package that records its calls."""
    module = types.ModuleType("wandb")
    calls: list = []

    class Run:
        def log(self, row, step):
            calls.append(("log", row, step))

        def finish(self):
            calls.append(("finish",))

    def init(**kw):
        calls.append(("init", kw))
        if fail_online and kw["mode"] == "online":
            raise ConnectionError("no route to host for key hf_aaaaaaaaaaaaaaaaaa")
        return Run()

    module.init, module.calls = init, calls  # type: ignore[attr-defined]
    module.Settings = lambda **kw: kw  # type: ignore[attr-defined]
    return module


@pytest.fixture
def wandb(monkeypatch, tmp_path):
    module = make_wandb()
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    return module


def test_s1_15_a_missing_key_warns_and_records_offline(tmp_path, wandb, warnings):
    with build_sinks(["wandb"], context(tmp_path)) as sinks:
        sinks.write({"step": 1, "kind": "train", "loss": 2.0, "note": "text", "flag": True})
    (_, init), log, finish = wandb.calls
    assert init["mode"] == "offline" and init["dir"] == str(tmp_path) and init["resume"] == "allow"
    assert log == ("log", {"train/loss": 2.0}, 1) and finish == ("finish",)
    assert "WANDB_API_KEY" in warnings.text and "offline" in warnings.text


def test_s1_15_with_a_key_it_goes_online(tmp_path, wandb, warnings, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    settings = {"lr": 1e-3, "url": "https://u:passw0rd@h/", "list": ["sk-aaaaaaaaaaaaaaa"]}
    build_sinks(["wandb"], context(tmp_path, project="p", settings=settings)).close()
    init = wandb.calls[0][1]
    assert init["mode"] == "online" and init["project"] == "p" and not warnings.records
    assert init["config"] == {"lr": 1e-3, "url": "https://u:***@h/", "list": ["***"]}
    build_sinks(["wandb"], context(tmp_path)).close()
    assert wandb.calls[2][1]["id"] == init["id"], "a resumed stage goes on in the same W&B run"


def test_s1_15_without_a_connection_it_records_offline(tmp_path, monkeypatch, warnings):
    module = make_wandb(fail_online=True)
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    build_sinks(["wandb"], context(tmp_path)).close()
    assert [c[1]["mode"] for c in module.calls if c[0] == "init"] == ["online", "offline"]
    assert "no route to host" in warnings.text and "hf_aaaa" not in warnings.text


def test_s1_15_the_users_own_mode_holds(tmp_path, wandb, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    build_sinks(["wandb"], context(tmp_path)).close()
    assert wandb.calls[0][1]["mode"] == "disabled"


def test_netrc_counts_as_a_key(tmp_path, wandb, monkeypatch):
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password 0123456789\n")
    (tmp_path / "netrc").chmod(0o600)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    build_sinks(["wandb"], context(tmp_path)).close()
    assert wandb.calls[0][1]["mode"] == "online"


@pytest.mark.parametrize("name", ["wandb", "tensorboard"])
def test_a_missing_library_names_the_extra(tmp_path, monkeypatch, name):
    real = builtins.__import__

    def no_library(module, *args, **kw):
        if module.split(".")[0] == name:
            raise ImportError(module)
        return real(module, *args, **kw)

    monkeypatch.setattr(builtins, "__import__", no_library)
    with pytest.raises(UsageError, match=r"burnish\[track\]") as found:
        build_sinks([name], context(tmp_path))
    assert found.value.exit_code == 2


def test_unknown_sink(tmp_path):
    with pytest.raises(UsageError, match="tensorboard, wandb"):
        build_sinks(["trackio"], context(tmp_path))
    assert len(build_sinks([], context(tmp_path))) == 0


def test_a_sink_that_fails_later_is_left_out_with_one_warning(warnings):
    class Broken:
        rows = 0

        def write(self, row, step):
            self.rows += 1
            raise OSError("connection lost")

        def close(self):
            raise AssertionError("closed after it failed")

    class Good(Broken):
        def write(self, row, step):
            self.rows += 1

        def close(self):
            pass

    broken, good = Broken(), Good()
    sinks = Sinks({"wandb": broken, "other": good})
    for step in range(3):
        sinks.write({"step": step, "loss": 1.0})
    sinks.close()
    assert (broken.rows, good.rows) == (1, 3)
    assert warnings.text.count("connection lost") == 1


def read_events(folder: Path) -> dict[str, list[tuple[int, float]]]:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(folder))
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    with build_sinks(["tensorboard"], context(tmp_path)) as sinks:
        for step in (1, 2, 3, 4):
            sinks.write({"step": step, "kind": "train", "loss": 1.0 / step, "bad": math.nan})
        sinks.write({"step": 4, "kind": "eval", "eval_loss": 0.5})
    found = read_events(tmp_path / "tensorboard")
    assert found == {
        "train/loss": [(1, 1.0), (2, 0.5), (3, pytest.approx(1 / 3)), (4, 0.25)],
        "eval/eval_loss": [(4, 0.5)],
    }
    with build_sinks(["tensorboard"], context(tmp_path, start_step=2)) as sinks:  # resumed from checkpoint-2
        sinks.write({"step": 3, "kind": "train", "loss": 9.0})
    assert read_events(tmp_path / "tensorboard")["train/loss"] == [(1, 1.0), (2, 0.5), (3, 9.0)]
