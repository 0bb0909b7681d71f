"""Paths that stay inside, free space, redaction (R-29), deletion (R-15), environment."""

import hashlib
from pathlib import Path

import pytest

from burnish.artifacts import deletion
from burnish.artifacts.deletion import delete_run, empty_trash
from burnish.artifacts.disk import inside
from burnish.artifacts.environment import describe_environment, git_commit
from burnish.artifacts.lock import RunLock
from burnish.artifacts.redact import redact, redact_tree
from burnish.disk import check_space, format_bytes
from burnish.errors import ResourceError, UsageError


def test_inside(tmp_path):
    root = tmp_path / "root"
    (root / "a/b").mkdir(parents=True)
    (root / "link").symlink_to(tmp_path)
    (root / "a/file").write_text("")
    (root / "a/loop").symlink_to("loop")
    for good in ("a", "a/b", "a/file", "a/new/er", "ü #1", root / "a"):
        assert inside(root, good).is_relative_to(root)
    for bad in (
        "",
        ".",
        "..",
        "../x",
        "a/../..",
        "/",
        "/etc/passwd",
        "link",
        "link/x",
        "a/loop",
        "a\0b",
        "a/file/x",
        root,
    ):
        with pytest.raises(UsageError):
            inside(root, bad)


def test_check_space(tmp_path):
    check_space(tmp_path / "not/there/yet", 1)
    with pytest.raises(ResourceError) as found:
        check_space(tmp_path / "x", 10**18, what="checkpoint-3")
    assert found.value.exit_code == 5 and "checkpoint-3 needs" in str(found.value)


def test_format_bytes():
    assert [format_bytes(x) for x in (0, 999, 1000, 1_234_567, 5e12)] == [
        "0 bytes",
        "999 bytes",
        "1 kB",
        "1.23 MB",
        "5 TB",
    ]


@pytest.mark.parametrize(
    ("text", "secret"),
    [
        ("token hf_AbCdEfGhIjKlMnOpQrStUv rest", "hf_AbCdEfGhIjKlMnOpQrStUv"),
        ("sk-proj-abc_DEF-0123456789xyz", "sk-proj-abc_DEF-0123456789xyz"),
        ("postgres://me:pa55:word@host:5432/db", "pa55:word"),
        ("https://h/x?a=1&access_token=abc%2Fdef&b=2", "abc%2Fdef"),
        ("Authorization: Bearer abcdefghij.klm", "abcdefghij.klm"),
        ("ghp_0123456789abcdefghijABCDEFGHIJ", "ghp_0123456789abcdefghijABCDEFGHIJ"),
        ("AKIAIOSFODNN7EXAMPLE", "AKIAIOSFODNN7EXAMPLE"),
        ('{"api_key": "q1w2e3r4t5"}', "q1w2e3r4t5"),
        ("WANDB_API_KEY=aaaabbbbccccdddd", "aaaabbbbccccdddd"),
        ("é from env: s3cr3t-value! é", "s3cr3t-value!"),
    ],
)
def test_r29_redact(text, secret):
    out = redact(text, {"SOME_API_KEY": "s3cr3t-value!", "PATH": "/bin", "TOKENIZERS_PARALLELISM": "false"})
    assert secret not in out and "***" in out
    assert redact(out, {}) == out


@pytest.mark.parametrize(
    "text",
    [
        "hf_transfer and hf_xet, sk-learn, desk-organisation-of-things, 395c6fc5dfa6a95ae533f86eb34addd0fc61c7e2",
        "https://huggingface.co/org/model@main C:\\x a:b@c eos_token: <|endoftext|> learning_rate: 0.0001",
        "tokens: 4096, pad_token: '<|padding|>'",
    ],
)
def test_r29_what_is_no_secret_stays(text):
    assert redact(text, {}) == text


def test_r29_trees():
    tree = {"password": "x", "list": ["sk-aaaaaaaaaaaaaaa", 1, None], "eos_token": "<|end|>", "hf_aaaaaaaaaaaaaa": 2.5}
    assert redact_tree(tree) == {"password": "***", "list": ["***", 1, None], "eos_token": "<|end|>", "***": 2.5}


def make_run(root: Path, name: str) -> Path:
    run = root / name
    (run / "01-sft").mkdir(parents=True)
    (run / "run.json").write_text("{}")
    return run


def test_r15_only_runs_directly_under_the_root_are_deleted(tmp_path):
    outside = tmp_path / "outside"
    make_run(outside, "canary")
    (outside / "file").write_text("precious")
    root = tmp_path / "runs"
    run = make_run(root, "good")
    (run / "01-sft/escape").symlink_to(outside)
    make_run(root, "nested/run")
    (root / "plain").mkdir()
    (root / "linked").symlink_to(outside / "canary")

    def snapshot() -> str:
        names = sorted(str(p) for p in tmp_path.rglob("*") if not p.name.startswith(".lock"))
        return hashlib.sha256("\n".join(names).encode()).hexdigest()

    before = snapshot()
    hostile = [
        "..",
        ".",
        "",
        "/",
        "a/../../b",
        "../outside/canary",
        str(outside / "canary"),
        "linked",
        "nested/run",
        "nested",
        "plain",
        "absent",
        "good/01-sft",
        "good/",
        "./good",
        "~",
        "good\0",
        "-rf",
        "*",
        "../runs/good",
        "linked/01-sft",
    ]
    for name in hostile:
        with pytest.raises(UsageError):
            delete_run(root, name)
    lock = RunLock(run).acquire()
    with pytest.raises(UsageError, match="in use"):
        delete_run(root, "good")
    lock.release()
    assert snapshot() == before
    delete_run(root, "good")
    assert not run.exists() and (outside / "file").read_text() == "precious" and (outside / "canary/run.json").exists()


@pytest.mark.parametrize("point", ["delete.rename", "delete.remove"])
def test_r15_a_crash_leaves_all_or_nothing(tmp_path, monkeypatch, point):
    run = make_run(tmp_path, "r")

    def fault(name: str) -> bool:
        if name == point:
            raise RuntimeError
        return False

    monkeypatch.setattr(deletion, "fault_point", fault)
    with pytest.raises(RuntimeError):
        delete_run(tmp_path, "r")
    assert run.exists() == (point == "delete.rename")
    (tmp_path / ".tmp-other").mkdir()
    empty_trash(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".tmp-other"] + (["r"] if run.exists() else [])


def test_environment_is_an_allow_list(monkeypatch):
    monkeypatch.setenv("SOMETHING_PRIVATE", "canary-value")
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    found = describe_environment({"threads": 2})
    assert found["variables"]["OMP_NUM_THREADS"] == "2" and found["threads"] == 2
    assert "canary-value" not in str(found)


def test_git_commit(tmp_path):
    assert git_commit(tmp_path / "x") in (None, git_commit(tmp_path))
    git = tmp_path / ".git"
    (git / "refs/heads").mkdir(parents=True)
    (git / "HEAD").write_text("ref: refs/heads/main\n")
    assert git_commit(tmp_path) is None
    (git / "packed-refs").write_text(f"# pack-refs\n{'a' * 40} refs/heads/main\n")
    assert git_commit(tmp_path / "sub") == "a" * 40
    (git / "refs/heads/main").write_text("b" * 40 + "\n")
    assert git_commit(tmp_path) == "b" * 40
    (git / "HEAD").write_text("c" * 40)
    assert git_commit(tmp_path) == "c" * 40
