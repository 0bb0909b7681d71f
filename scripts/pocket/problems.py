"""Word problems of one, two and three steps, each with a short worked solution."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from pocket.grammar import Draw, Pool
from pocket.world import PEOPLE, THINGS, Person, Thing

Sign = Literal["+", "-", "*", "/"]
_OTHER_SIGN: dict[Sign, Sign] = {"+": "-", "-": "+", "*": "+", "/": "-"}

START = Pool(
    "start",
    train=(
        "{A} has {n} {objs}.",
        "{A} [owns|keeps] {n} {objs}.",
        "There are {n} {objs} in the house of {A}.",
        "In the morning {A} has {n} {objs}.",
        "{A} [picks|finds|buys] {n} {objs}.",
        "{A} starts with {n} {objs}.",
        "{A} brings {n} {objs} [home|to the market].",
        "On the table of {A} there are {n} {objs}.",
    ),
    test=(
        "{A} [owns|has] a {box} with {n} {objs}.",
        "At the market {A} buys {n} {objs}.",
        "In the house of {A} there are {n} {objs}.",
        "{A} keeps {n} {objs} at home.",
    ),
)
GROUP = Pool(
    "group",
    train=(
        "{A} has {g} {boxes} with {k} {objs} in each.",
        "{A} fills {g} {boxes} with {k} {objs} each.",
        "There are {g} {boxes} and each one holds {k} {objs}. They belong to {A}.",
        "{A} buys {g} {boxes}. There are {k} {objs} in each of them.",
        "{A} finds {g} {boxes} of {k} {objs} each.",
    ),
    test=(
        "{A} owns {g} {boxes}. Each one holds {k} {objs}.",
        "In the house of {A} there are {g} {boxes} of {k} {objs} each.",
        "{A} brings {g} {boxes} with {k} {objs} in each.",
    ),
)
GAIN = Pool(
    "gain",
    train=(
        "{She} finds {y} more.",
        "{B} gives {him} {y} more.",
        "Then {she} buys {y} more {objs}.",
        "{She} gets {y} more {objs} from {B}.",
        "Later {she} picks {y} more.",
        "After that {B} brings {y} more {objs}.",
        "Then {B} adds {y} {objs}.",
        "At noon {she} buys another {y} {objs}.",
    ),
    test=(
        "Later {B} gives {him} {y} more {objs}.",
        "After that {she} finds another {y}.",
        "Then {she} gets {y} more from {B}.",
        "At noon {B} adds {y} more {objs}.",
    ),
)
LOSS = Pool(
    "loss",
    train=(
        "{She} gives {y} to {B}.",
        "Then {she} loses {y} of them.",
        "{She} sells {y} {objs}.",
        "Later {B} takes {y} of them away.",
        "After that {she} uses {y}.",
        "{She} gives away {y} {objs}.",
        "Then {B} breaks {y} of them.",
        "At noon {she} drops {y} {objs} in the river.",
    ),
    test=(
        "Later {she} sells {y} of them.",
        "Then {she} gives {B} {y} {objs}.",
        "After that {B} takes {y} {objs} away.",
        "At noon {she} loses {y}.",
    ),
)
ASK_NOW = Pool(
    "ask_now",
    train=(
        "How many {objs} does {A} have now?",
        "How many {objs} are there now?",
        "How many {objs} does {she} have in the end?",
        "How many does {A} have now?",
        "Count the {objs} of {A} now. How many are there?",
    ),
    test=(
        "How many {objs} does {A} have in the end?",
        "How many {objs} are there in the end?",
        "Now how many {objs} does {she} have?",
    ),
)
SHARE = Pool(
    "share",
    train=(
        "{She} shares all the {objs} equally among {y} friends. How many does each friend get?",
        "Then {y} children share them equally. How many {objs} does each child get?",
        "{She} puts the {objs} into {y} {boxes}, the same number in each. How many are in one of the {boxes}?",
    ),
    test=(
        "{She} shares them equally among {y} children. How many {objs} does each child get?",
        "Then {y} friends share all the {objs} equally. How many does each friend get?",
    ),
)
PRICE = Pool(
    "price",
    train=(
        "{She} sells them all for {y} pence each. How many pence does {she} get?",
        "Each one costs {y} pence. How many pence do they cost together?",
        "{C} pays {y} pence for each of them. How many pence does {C} pay?",
    ),
    test=(
        "{She} sells each one for {y} pence. How many pence does {A} get?",
        "{C} buys them all and pays {y} pence for each. How many pence does {C} pay?",
    ),
)
MORE = Pool(
    "more",
    train=(
        "{C} has {y} more {objs} than {A}. How many {objs} does {C} have?",
        "{C} has {y} more. How many {objs} does {C} have?",
        "{C} owns {y} {objs} more than {she} does. How many does {C} own?",
    ),
    test=(
        "{C} has {y} {objs} more than {A}. How many does {C} have?",
        "{C} owns {y} more than {A}. How many {objs} does {C} own?",
    ),
)
FEWER = Pool(
    "fewer",
    train=(
        "{C} has {y} fewer {objs} than {A}. How many {objs} does {C} have?",
        "{C} has {y} fewer. How many {objs} does {C} have?",
        "{C} owns {y} {objs} fewer than {she} does. How many does {C} own?",
    ),
    test=(
        "{C} has {y} {objs} fewer than {A}. How many does {C} have?",
        "{C} owns {y} fewer than {A}. How many {objs} does {C} own?",
    ),
)
TOGETHER = Pool(
    "together",
    train=(
        "{C} has {y} {objs}. How many {objs} do they have together?",
        "{C} brings {y} {objs}. How many do {A} and {C} have together?",
        "{C} has {y} of them too. How many {objs} do they have in all?",
    ),
    test=(
        "{C} has {y} {objs} too. How many do they have together?",
        "{C} brings {y}. How many {objs} do {A} and {C} have in all?",
    ),
)
ENDINGS: dict[str, tuple[Pool, Sign]] = {
    "share": (SHARE, "/"),
    "price": (PRICE, "*"),
    "more": (MORE, "+"),
    "fewer": (FEWER, "-"),
    "together": (TOGETHER, "+"),
}


@dataclass(frozen=True)
class Range:
    """How large the numbers of a problem may be."""

    start: int
    change: int
    groups: int
    limit: int


SMALL = Range(start=25, change=15, groups=6, limit=60)
LARGE = Range(start=50, change=25, groups=9, limit=99)


@dataclass(frozen=True)
class Step:
    """One step of a calculation: `left sign right`, counted in `unit`."""

    left: int
    sign: Sign
    right: int
    unit: str

    @property
    def value(self) -> int:
        """What the step comes to."""
        return calculate(self.left, self.sign, self.right)

    def __str__(self) -> str:
        return f"{self.left} {self.sign} {self.right} = {self.value} {self.unit}"


@dataclass(frozen=True)
class Problem:
    """A word problem, its calculation and its solution in words."""

    question: str
    steps: tuple[Step, ...]
    templates: tuple[str, ...]

    @property
    def level(self) -> int:
        """How many steps it takes."""
        return len(self.steps)

    @property
    def value(self) -> int:
        """The right answer."""
        return self.steps[-1].value

    @property
    def solution(self) -> str:
        """The worked solution, which ends in `#### <number>`."""
        return render_solution([str(step) for step in self.steps], self.value)

    @property
    def plain(self) -> str:
        """The problem as the pretraining text writes it."""
        worked = work([str(step) for step in self.steps])
        return f"Problem: {self.question}\nSolution: {worked} The answer is {self.value}."


def calculate(left: int, sign: Sign, right: int) -> int:
    """`left sign right`."""
    match sign:
        case "+":
            return left + right
        case "-":
            return left - right
        case "*":
            return left * right
        case "/":
            return left // right


def work(lines: Sequence[str]) -> str:
    """The steps of a solution in words."""
    openers = ("First", "Then", "Last") if len(lines) > 1 else ("So",)
    return " ".join(f"{openers[min(index, 2)]} {line}." for index, line in enumerate(lines))


def render_solution(lines: Sequence[str], value: int) -> str:
    """A worked solution whose last line is `#### value`."""
    return f"{work(lines)}\n#### {value}"


class _Writer:
    """Writes one problem, clause by clause, keeping count."""

    def __init__(self, draw: Draw, numbers: Range) -> None:
        self.draw = draw
        self.numbers = numbers
        people: list[Person] = draw.sample(PEOPLE, 3)
        self.thing: Thing = draw.choice(THINGS)
        self.slots: dict[str, object] = {
            **people[0].slots(),
            "B": people[1].name,
            "C": people[2].name,
            "objs": self.thing.plural,
            "box": self.thing.box,
            "boxes": self.thing.boxes,
        }
        self.steps: list[Step] = []
        self.parts: list[str] = []
        self.count = 0

    def say(self, pool: Pool, **more: object) -> None:
        """Add a clause."""
        self.parts.append(self.draw.text(pool, **self.slots, **more))

    def step(self, sign: Sign, right: int, unit: str | None = None) -> None:
        """Add a step and move the count."""
        step = Step(self.count, sign, right, unit or self.thing.plural)
        self.steps.append(step)
        self.count = step.value

    def start(self, grouped: bool) -> None:
        """Say what there is at first."""
        rng = self.draw.rng
        if grouped:
            groups, each = rng.randint(2, self.numbers.groups), rng.randint(2, 9)
            self.say(GROUP, g=groups, k=each)
            self.count = groups
            self.step("*", each)
        else:
            self.count = rng.randint(3, self.numbers.start)
            self.say(START, n=self.count)

    def change(self) -> None:
        """Add or take away some."""
        rng = self.draw.rng
        most = self.numbers.change
        gain = self.count < 6 or (self.count <= self.numbers.limit - most - 5 and rng.random() < 0.5)
        amount = rng.randint(2, most) if gain else rng.randint(2, min(most, self.count - 2))
        self.say(GAIN if gain else LOSS, y=amount)
        self.step("+" if gain else "-", amount)

    def end(self, kind: str) -> bool:
        """Add the last step, which asks its own question; False where the count does not allow it."""
        rng = self.draw.rng
        pool, sign = ENDINGS[kind]
        match sign:
            case "/":
                divisors = [number for number in range(2, 8) if self.count % number == 0 and self.count > number]
                if not divisors:
                    return False
                amount = self.draw.choice(divisors)
            case "*":
                if self.count > 12:
                    return False
                amount = rng.randint(2, min(6, self.numbers.limit // self.count))
            case "+":
                amount = rng.randint(2, self.numbers.change)
            case "-":
                if self.count < 5:
                    return False
                amount = rng.randint(2, min(self.numbers.change, self.count - 2))
        self.say(pool, y=amount)
        self.step(sign, amount, "pence" if kind == "price" else None)
        return True


def make_problem(draw: Draw, level: int, numbers: Range = LARGE) -> Problem:
    """A problem of `level` steps."""
    while True:
        writer = _Writer(Draw(draw.rng, draw.split), numbers)
        writer.start(grouped=draw.chance(0.3))
        ending = draw.choice((None, None, None, *ENDINGS)) if len(writer.steps) < level else None
        changes = level - len(writer.steps) - (ending is not None)
        for _ in range(changes):
            writer.change()
        if ending is not None:
            if not writer.end(ending):
                continue
        elif changes == 0 and not writer.steps:
            continue
        else:
            writer.say(ASK_NOW)
        draw.used.extend(writer.draw.used)
        return Problem(" ".join(writer.parts), tuple(writer.steps), tuple(writer.draw.used))


def wrong_solution(draw: Draw, problem: Problem) -> str:
    """A solution in the same manner whose answer is wrong."""
    while True:
        kind = draw.choice(("slip", "sign", "number", "number", "steps", "end", "end"))
        if kind == "end":
            other = draw.choice(
                (problem.steps[0].left, problem.steps[-1].right, problem.value + draw.rng.randint(2, 20))
            )
            if other != problem.value:
                return render_solution([str(step) for step in problem.steps], other)
        elif kind == "steps":
            steps = _step_too_few_or_many(draw, problem)
            if steps[-1].value not in (problem.value, 0):
                return render_solution([str(step) for step in steps], steps[-1].value)
        else:
            steps = _spoiled(draw, problem, kind)
            if steps and steps[-1][1] != problem.value:
                return render_solution([text for text, _ in steps], steps[-1][1])


def _step_too_few_or_many(draw: Draw, problem: Problem) -> tuple[Step, ...]:
    few = problem.level == 3 or (problem.level == 2 and draw.chance(0.5))
    if few:
        return problem.steps[:-1]
    last = problem.steps[-1]
    sign: Sign = "+" if last.value < 10 or draw.chance(0.5) else "-"
    extra = Step(last.value, sign, draw.rng.randint(2, 9), last.unit)
    return (*problem.steps, extra)


def _spoiled(draw: Draw, problem: Problem, kind: str) -> list[tuple[str, int]]:
    """The steps with one of them wrong, each as its text and value; empty where a value fell below nothing."""
    where = draw.rng.randrange(problem.level)
    lines: list[tuple[str, int]] = []
    count = problem.steps[0].left
    for index, step in enumerate(problem.steps):
        left, sign, right = count, step.sign, step.right
        if index == where and kind == "sign":
            sign = _OTHER_SIGN[sign]
        if index == where and kind == "number":
            right = draw.rng.randint(2, 30)
        count = calculate(left, sign, right)
        if index == where and kind == "slip":
            count += draw.choice((-10, -4, -3, -2, -1, 1, 2, 3, 4, 10))
        if count < 0:
            return []
        lines.append((f"{left} {sign} {right} = {count} {step.unit}", count))
    return lines
