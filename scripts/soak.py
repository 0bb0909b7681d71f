"""The soak: one long run of training under SIGKILL, SIGTERM, Ctrl-C, full disk, faults of the disk, suspension, clock
jumps, second starts and readers, at random from a printed seed; it must end with the bits of an undisturbed run.

    python scripts/soak.py                    # one hour: pace, calm run, disturbed run
    python scripts/soak.py --minutes 3        # a trial
    python scripts/soak.py --seed 17          # the same sequence of draws again

After each disturbance that ends the process the same command is given again. Compared at the end: the weights of
`final/`, the last checkpoint (weights, optimizer moments, state) and metrics.jsonl, byte for byte. A wrong exit status, a
missing message, a traceback, a damaged checkpoint or record, a reader's error or a digest that differs is a failure.

Where the system lets a user mount, the run folder lies on a small tmpfs that is really filled; elsewhere the fault hook
`enospc` stands for it. The log has a line for each event and goes to the screen and to `--log`. Exit status: 0 or 1.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DISK_BYTES = 256 << 20
SAVE_EVERY = 50
PATIENCE = 300  # seconds in which a process ends after a signal, however slow the machine
FATAL = {"kill": 6, "term": 3, "int": 1, "full": 3, "fault-kill": 3, "fault-disk": 2}
HARMLESS = {"clock": 4, "suspend": 1, "second": 1}
KILL_POINTS = [
    ("step.forward", 80),
    ("step.backward", 80),
    ("update.before_optimizer", 80),
    ("update.after_optimizer", 80),
    ("loop.after_step", 80),
    ("metrics.write", 80),
    ("metrics.fsync", 2),
    ("folder.mkdir", 3),
    ("folder.fsync_file", 4),
    ("folder.write", 3),
    ("folder.manifest", 3),
    ("folder.fsync_dir", 3),
    ("folder.rename", 3),
    ("folder.fsync_parent", 3),
    ("prune.rename", 2),
    ("prune.remove", 2),
    ("file.write", 8),
    ("file.rename", 8),
]
DISK_POINTS = [
    ("metrics.write", 80),
    ("metrics.fsync", 2),
    ("folder.mkdir", 2),
    ("folder.fsync_file", 3),
    ("folder.write", 2),
    ("folder.manifest", 2),
    ("folder.rename", 2),
    ("folder.fsync_parent", 2),
]


class Awake(threading.Thread):
    """A clock that counts only while this process runs: after a suspension of the machine no deadline has passed."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._seconds = 0.0
        self.start()

    def __call__(self) -> float:
        return self._seconds

    def run(self) -> None:
        last = time.monotonic()
        while True:
            time.sleep(0.02)
            now = time.monotonic()
            self._seconds += min(now - last, 0.5)
            last = now


awake = Awake()


class Failure(Exception):
    """Something that must hold did not."""


@dataclass
class Plan:
    """What is run, and where."""

    kind: str
    model: str
    seed: int
    work: Path
    disk: Path
    mounted: bool
    steps: int = 0
    pace: float = 0.1
    overhead: float = 8.0
    log: Path = Path()
    draw: random.Random = field(default_factory=random.Random)
    counts: Counter[str] = field(default_factory=Counter)
    peak: int = 0
    stated: int | None = None
    began: float = field(default_factory=awake)

    @property
    def clock(self) -> Path:
        return self.work / "clock"

    def run_dir(self, root: str) -> Path:
        return self.disk / root / "soak"

    def stage_dir(self, root: str) -> Path:
        return self.run_dir(root) / f"01-{self.kind}"

    def command(self, root: str, steps: int) -> list[str]:
        data = "pocket/chat" if self.kind == "sft" else "pocket/preferences"
        words = f"""{self.kind} --model {self.model} --data {data} --run-name soak --batch-size 8 --seed 11
            --max-steps {steps} --save-steps {SAVE_EVERY} --eval-steps 2000 --learning-rate 1e-4 --precision fp32"""
        return [sys.executable, "-m", "burnish", *words.split(), "--output-dir", str(self.disk / root)]

    def say(self, event: str, step: int, text: str) -> None:
        passed = int(awake() - self.began)
        stamp = f"{passed // 3600:02d}:{passed // 60 % 60:02d}:{passed % 60:02d}"
        line = f"{stamp}  {event:<10}  step {step:>6}  {text}"
        print(line, flush=True)
        with self.log.open("a", encoding="utf-8") as stream:
            stream.write(line + "\n")


class Segment:
    """One start of the command, with what it says."""

    def __init__(self, plan: Plan, root: str, steps: int, fault: str = "") -> None:
        self.plan, self.root, self.fault = plan, root, fault
        self.first = last_step(plan.stage_dir(root))
        self.out = plan.work / "output.txt"
        env = os.environ | {"BURNISH_TESTING": "1", "BURNISH_CLOCK": str(plan.clock), "OMP_NUM_THREADS": "1"}
        env |= {"BURNISH_CACHE": str(plan.work / "cache"), "HF_HUB_OFFLINE": "1", "TERM": "dumb"}
        env["BURNISH_FAULT"] = fault
        env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT / "src"), env.get("PYTHONPATH")]))
        with self.out.open("wb") as stream:
            self.process = subprocess.Popen(
                plan.command(root, steps), env=env, cwd=plan.work, stdout=stream, stderr=subprocess.STDOUT
            )
        self.started = awake()

    def wait(self, seconds: float) -> int | None:
        """The exit status, or None if the process still runs after `seconds`."""
        until = awake() + seconds
        while (status := self.process.poll()) is None and awake() < until:
            time.sleep(0.02)
        return status

    def text(self) -> str:
        return self.out.read_text(encoding="utf-8", errors="replace")

    def wait_at_fault(self) -> None:
        """Until the process has stopped itself at its fault point, or ended."""
        while self.process.poll() is None:
            with contextlib.suppress(OSError):
                if Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T":
                    return
            time.sleep(0.02)

    def go_on(self) -> None:
        """Let a process that stopped itself run again."""
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGCONT)

    @property
    def training(self) -> bool:
        """Whether this start has reached its first step."""
        return re.search(rf"^{self.plan.kind} +step ", self.text(), re.MULTILINE) is not None

    def step(self) -> int:
        return last_step(self.plan.stage_dir(self.root))


def last_step(stage: Path) -> int:
    """The step of the last whole training row of metrics.jsonl."""
    with contextlib.suppress(OSError):
        with (stage / "metrics.jsonl").open("rb") as stream:
            size = stream.seek(0, 2)
            stream.seek(max(0, size - 8192))
            tail = stream.read()
        found = re.findall(rb'"step": (\d+)}\n', tail)
        return int(found[-1]) if found else 0
    return 0


def compute_digest(stage: Path, steps: int) -> dict[str, str]:
    """File → SHA-256 of all that two equal runs share."""
    files = sorted((stage / "final").glob("*.safetensors"))
    last = stage / f"checkpoint-{steps}"
    files += [last / "model.safetensors", last / "optimizer.safetensors", stage / "metrics.jsonl"]
    found = {p.relative_to(stage).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}
    state = json.loads((last / "state.json").read_text())
    state["counters"].pop("timing_mark", None)  # the length of timing.jsonl, whose seconds differ
    name = (last / "state.json").relative_to(stage).as_posix()
    return found | {name: hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()}


def folder_bytes(folder: Path) -> int:
    """Bytes of all files below a folder; files may vanish meanwhile."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.lstat(Path(place) / name).st_size
    return total


# -- readers ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def reading(plan: Plan, root: str) -> Iterator[Path]:
    """A reader beside the run; its output is the file that is yielded."""
    out = plan.work / "reader.txt"
    env = os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    with out.open("wb") as stream:
        words = [sys.executable, str(ROOT / "scripts/soak_reader.py"), str(plan.disk / root), str(plan.seed)]
        child = subprocess.Popen(words, env=env, stdout=stream, stderr=subprocess.STDOUT)
    try:
        yield out
    finally:
        child.kill()
        child.wait()


@contextlib.contextmanager
def measuring(plan: Plan, root: str) -> Iterator[None]:
    """Keeps the peak of the run folder's bytes in `plan.peak`."""
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.05):
            plan.peak = max(plan.peak, folder_bytes(plan.run_dir(root)))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


# -- disturbances -----------------------------------------------------------------------------------------------------


def jump_clock(plan: Plan, segment: Segment) -> str:
    """The wall clock jumps and all checkpoints get times of modification from anywhere."""
    seconds = plan.draw.choice((-3600, 3600, -1800, 365 * 86400, -365 * 86400, plan.draw.randint(-86400, 86400), 0))
    fresh = plan.clock.with_suffix(".new")
    fresh.write_text(str(seconds))
    fresh.replace(plan.clock)
    moved = 0
    for place in plan.stage_dir(segment.root).glob("checkpoint-*"):
        with contextlib.suppress(FileNotFoundError):
            os.utime(place, (then := time.time() + plan.draw.randint(-(10**8), 10**8), then))
            moved += 1
    return f"wall clock {seconds:+,d} s, times of {moved} checkpoints scattered"


def suspend(plan: Plan, segment: Segment) -> str:
    """The process is stopped for a while, as by a laptop's lid."""
    seconds = plan.draw.uniform(0.5, 4.0)
    segment.process.send_signal(signal.SIGSTOP)
    time.sleep(seconds)
    segment.process.send_signal(signal.SIGCONT)
    return f"stopped for {seconds:.1f} s"


def start_second(plan: Plan, segment: Segment) -> str:
    """The same command beside the running one must be refused."""
    env = os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", "BURNISH_FAULT": ""}
    other = subprocess.run(
        plan.command(segment.root, plan.steps),
        env=env | {"BURNISH_CACHE": str(plan.work / "cache")},
        cwd=plan.work,
        capture_output=True,
        text=True,
    )
    if segment.process.poll() is not None:
        return "the first one ended meanwhile" if other.returncode else "the first one had ended: ran in its place"
    if other.returncode != 2 or f"in use by process {segment.process.pid}" not in other.stderr:
        raise Failure(f"a second start ended with {other.returncode}: {other.stderr[-500:]}")
    return "a second start was refused (exit 2)"


def fill_disk(plan: Plan, segment: Segment) -> tuple[int | None, str]:
    """Leave few bytes or none until the process ends, at most 60 s."""
    left = plan.draw.choice((0, 0, plan.draw.randint(0, 25_000_000)))
    filler, began, status = plan.disk / "filler", awake(), None
    with filler.open("wb") as stream:
        size = 0
        while status is None and awake() - began < 60:
            free = shutil.disk_usage(plan.disk).free
            if free > left:
                with contextlib.suppress(OSError):
                    os.posix_fallocate(stream.fileno(), size, free - left)
                    size += free - left
            segment.go_on()
            status = segment.wait(0.1)
    filler.unlink()
    return status, f"{left:,} bytes left free · "


def check_end(plan: Plan, segment: Segment, event: str, status: int) -> None:
    """The exit status and the words that belong to an event; nothing damaged afterwards."""
    text = segment.text()
    wrong = ""
    if status == 0:
        return
    if event == "kill" or event == "fault-kill":
        wrong = "" if status == -9 else "not -9"
    elif event in ("term", "int"):
        number = signal.SIGTERM if event == "term" else signal.SIGINT
        early = not segment.training or f"{plan.kind}: done" in text or segment.step() >= plan.steps
        allowed = (128 + number, -number) if early else (128 + number,)
        wrong = "" if status in allowed else f"not {allowed[0]}"
        if not wrong and not early and "same command" not in text:
            wrong = "the message does not say how to go on"
    elif event in ("full", "fault-disk"):
        words = ("No space left", "are free", "Input/output error", "no space left")
        wrong = "" if status == 5 else "not 5"
        if not wrong and not (any(w in text for w in words) and "→" in text):
            wrong = "the message does not name the cause and a remedy"
    if not wrong and "Traceback" in text:
        wrong = "a traceback"
    if wrong:
        raise Failure(f"{event} ended with {status}: {wrong}\n{text[-3000:]}")
    from burnish.artifacts.checkpoints import newest_valid

    problems = newest_valid(plan.stage_dir(segment.root))[1]
    if problems:
        raise Failure(f"after {event}: {problems[0]}")


def choose_fault(plan: Plan, event: str) -> str:
    """The hook for an event that acts from within."""
    if event == "fault-kill":
        point, most = plan.draw.choice(KILL_POINTS)
        return f"{point}:{plan.draw.randint(1, most)}:kill"
    if event == "fault-disk" or (event == "full" and not plan.mounted):
        point, most = plan.draw.choice(DISK_POINTS)
        return f"{point}:{plan.draw.randint(1, most)}:{'enospc' if event == 'full' else plan.draw.choice(('enospc', 'eio'))}"
    return ""


def choose_lifetime(plan: Plan, deadline: float, step: int) -> float | None:
    """Seconds until the next fatal event, so that the run ends at the deadline; None when it must be let alone now."""
    need = (plan.steps - step) * plan.pace * 1.25
    spare = deadline - awake() - need - plan.overhead
    cost = plan.overhead + SAVE_EVERY * plan.pace / 2
    if spare < cost:
        return None
    if plan.draw.random() < 0.15:
        return plan.draw.uniform(0.1, plan.overhead)
    first = plan.overhead if step == 0 else 0.0  # the reference's log-probs are computed before the first step
    return (
        first + plan.overhead * 0.8 + plan.draw.expovariate(1 / max(need / (spare / cost), SAVE_EVERY * plan.pace / 2))
    )


def run_harmless(plan: Plan, segment: Segment, until: float) -> None:
    """Events that a run outlives, until a moment or the process's end."""
    mean = 20.0
    while True:
        pause = plan.draw.expovariate(1 / mean)
        if awake() + pause >= until:
            segment.wait(until - awake())
            return
        if segment.wait(pause) is not None:
            return
        event = plan.draw.choices(list(HARMLESS), list(HARMLESS.values()))[0]
        if event == "second" and until - awake() < plan.overhead:
            continue
        if event == "second" and not segment.training:
            continue
        text = {"clock": jump_clock, "suspend": suspend, "second": start_second}[event](plan, segment)
        plan.counts[event] += 1
        plan.say(event, segment.step(), text)


def disturb(plan: Plan, deadline: float, events: list[str] | None, fixed: int) -> None:
    """Starts and disturbances until the run is done; given `events` happen `fixed` steps after a start."""
    root, status = "disturbed", None
    while status != 0:
        at = last_step(plan.stage_dir(root))
        lifetime = choose_lifetime(plan, deadline, at) if events is None else None
        event = ""
        if events or lifetime is not None:
            event = events.pop(0) if events else plan.draw.choices(list(FATAL), list(FATAL.values()))[0]
        at_step = f"loop.after_step:{fixed}:stop" if event and events is not None else ""
        segment = Segment(plan, root, plan.steps, choose_fault(plan, event) or at_step)
        try:
            if events is None:
                run_harmless(plan, segment, segment.started + (lifetime if lifetime is not None else 86400.0))
            else:
                segment.wait_at_fault()
            step, status = segment.step(), segment.process.poll()
            note = f"{segment.fault} · " if segment.fault else ""
            if status is None:
                if event == "full" and plan.mounted:
                    status, note = fill_disk(plan, segment)
                    if status is None:
                        plan.say(event, step, f"{note}it went on within what was left")
                        event, note = "kill", ""
                elif segment.fault != at_step:
                    event, note = "kill", f"{segment.fault} not reached · "
                if status is None:
                    number = {"term": signal.SIGTERM, "int": signal.SIGINT}.get(event, signal.SIGKILL)
                    segment.process.send_signal(number)
                    segment.go_on()
                    status = segment.wait(PATIENCE)
                    if status is None:
                        raise Failure(f"{event}: still there {PATIENCE} s later\n{segment.text()[-2000:]}")
            elif status not in (0, -9, 5) or (status and not segment.fault):
                raise Failure(f"ended by itself with {status}\n{segment.text()[-3000:]}")
            if plan.stated is None and (found := re.search(r"at most ([\d,]+) bytes", segment.text())):
                plan.stated = int(found[1].replace(",", ""))
            if status != 0:
                plan.counts[event] += 1
                check_end(plan, segment, event, status)
            age = awake() - segment.started
            ending = f"exit {status}" if status >= 0 else f"signal {-status}"
            saved = max([0, *(int(p.name.split("-")[1]) for p in plan.stage_dir(root).glob("checkpoint-*"))])
            plan.say(
                event if status else "done",
                segment.step(),
                f"{note}after {age:.1f} s: {ending}; from {at}, saved {saved}",
            )
        finally:
            if segment.process.poll() is None:
                segment.process.kill()
                segment.process.wait()


# -- the whole --------------------------------------------------------------------------------------------------------


def run_calm(plan: Plan, root: str, steps: int) -> float:
    """An undisturbed run; returns its seconds."""
    segment = Segment(plan, root, steps)
    status = segment.process.wait()
    if status != 0:
        raise Failure(f"an undisturbed run ended with {status}\n{segment.text()[-3000:]}")
    return awake() - segment.started


def measure_pace(plan: Plan) -> None:
    """Seconds a step and seconds around the steps, from a short run."""
    steps = 4 * SAVE_EVERY
    whole = run_calm(plan, "pace", steps)
    again = Segment(plan, "pace", steps)
    again.process.wait()
    skipped = awake() - again.started
    rows = (plan.stage_dir("pace") / "timing.jsonl").read_text().splitlines()
    plan.pace = sum(json.loads(r)["seconds"] for r in rows) / len(rows) * 1.1
    plan.overhead = skipped + 1.0
    plan.say("pace", steps, f"{plan.pace:.3f} s a step, {plan.overhead:.1f} s a start, {whole:.1f} s in all")
    shutil.rmtree(plan.disk / "pace")


def soak(plan: Plan, minutes: float, steps: int, events: list[str] | None, fixed: int) -> None:
    """The three runs and the comparison."""
    deadline = plan.began + 60 * minutes
    plan.clock.write_text("0")
    if steps:
        plan.steps, plan.overhead = steps, 9.0
    else:
        measure_pace(plan)
        plan.steps = max(2 * SAVE_EVERY, int((deadline - awake() - 3 * plan.overhead) * 0.28 / plan.pace))
    seconds = run_calm(plan, "calm", plan.steps)
    expected = compute_digest(plan.stage_dir("calm"), plan.steps)
    plan.say(
        "calm", plan.steps, f"undisturbed run done in {seconds:.1f} s, {folder_bytes(plan.run_dir('calm')):,} bytes"
    )
    shutil.rmtree(plan.disk / "calm")
    if not steps:
        plan.pace = (seconds - plan.overhead) / plan.steps
    root = "disturbed"
    with reading(plan, root) as out, measuring(plan, root):
        disturb(plan, deadline, events, fixed)
        reader = out.read_text(errors="replace").splitlines()
    passes = Counter(reader)
    errors = [
        line for line in reader if line.split(" ")[0] not in ("listing", "metrics", "records", "checkpoints", "report")
    ]
    if errors or not passes:
        raise Failure(
            f"{len(errors)} errors of {len(reader)} passes of the reader, the first: {(errors or ['none ran'])[0]}"
        )
    plan.say("readers", plan.steps, ", ".join(f"{n} {name}" for name, n in sorted(passes.items())) + ": no error")
    bound = plan.stated
    told = f"the run said at most {bound:,}" if bound is not None else "the run stated no figure"
    plan.say("disk", plan.steps, f"run folder peaked at {plan.peak:,} bytes; {told}")
    if bound is not None and plan.peak > bound:
        raise Failure(f"the run folder grew to {plan.peak:,} bytes, more than the {bound:,} that the run said")
    found = compute_digest(plan.stage_dir(root), plan.steps)
    for name, digest in expected.items():
        if found.get(name) != digest:
            raise Failure(f"{name} differs from the undisturbed run's: {found.get(name)} instead of {digest}")
        plan.say("equal", plan.steps, f"{digest}  {name}")


def mount_small_disk(disk: Path) -> bool:
    """Mount a tmpfs at `disk` if this process may."""
    words = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(disk)]
    return subprocess.run(words, capture_output=True).returncode == 0


def enter_namespace() -> None:
    """Start over in a mount namespace of our own, where that is allowed; returns where it is not."""
    unshare = shutil.which("unshare")
    if unshare and subprocess.run([unshare, "-rm", "true"], capture_output=True).returncode == 0:
        os.execv(unshare, [unshare, "-rm", sys.executable, *sys.argv, "--inside"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--kind", choices=("dpo", "sft", "reward"), default="dpo")
    parser.add_argument("--model", default="pocket")
    parser.add_argument("--log", type=Path, default=Path("soak.log"))
    parser.add_argument("--steps", type=int, default=0, help="a fixed length instead of one measured for --minutes")
    parser.add_argument("--events", nargs="*", choices=list(FATAL), help="these disturbances, in order, and no others")
    parser.add_argument("--after", type=int, default=20, help="steps of each start before the next of --events")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT / "src"))
    if not args.inside:
        enter_namespace()
    seed = args.seed if args.seed is not None else random.SystemRandom().randrange(10**6)
    args.log.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="burnish-soak-") as folder:
        work = Path(folder)
        disk = work / "disk"
        disk.mkdir()
        mounted = args.inside and mount_small_disk(disk)
        plan = Plan(args.kind, args.model, seed, work, disk, mounted, log=args.log.absolute(), draw=random.Random(seed))
        kind = f"a tmpfs of {DISK_BYTES >> 20} MiB" if mounted else "the hook enospc (no mount is allowed here)"
        plan.say(
            "start", 0, f"seed {seed} · {args.minutes:g} minutes · {args.kind} of {args.model} · full disk by {kind}"
        )
        try:
            soak(plan, args.minutes, args.steps, args.events, args.after)
            told = ", ".join(f"{n} {name}" for name, n in sorted(plan.counts.items()))
            plan.say("PASSED", plan.steps, f"seed {seed} · {told}")
            return 0
        except Failure as failure:
            plan.say("FAILED", last_step(plan.stage_dir("disturbed")), f"seed {seed} · {failure}")
            kept = plan.log.with_suffix(".failed")
            shutil.rmtree(kept, ignore_errors=True)
            shutil.copytree(disk, kept, symlinks=True)
            plan.say("kept", 0, f"the folders as they were: {kept}")
            return 1
        finally:
            if mounted:
                subprocess.run(["umount", "-l", str(disk)], capture_output=True)


if __name__ == "__main__":
    sys.exit(main())
