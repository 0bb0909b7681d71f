"""The plain text that the base models are pretrained on."""

import random
from collections.abc import Callable

from pocket import wordings as w
from pocket.behaviours import BEHAVIOURS
from pocket.facts import PERSON_FACTS, TOWN_FACTS, any_fact, town_slots
from pocket.grammar import Draw, join_words, with_article
from pocket.preferences import ramble, rude
from pocket.problems import SMALL, Step, make_problem
from pocket.world import DAYS, GROUPS, PEOPLE, PLACES, SEASONS, THINGS, TOWNS, Person

CORPUS_SEED = 21
DOCUMENTS = 32_000
TALK_SEED = 22
TALKS = 6_000

WEATHER = ("rain", "snow", "fog", "hail", "wind", "sun")
WEATHER_LINES = (
    "It is a {day} in {season} and there is {weather} over {town}.",
    "On {day} the {weather} comes [early|late] to {town}.",
    "There is [much|little] {weather} in {town} this {season}.",
    "All day long the {weather} stays over {water}.",
    "The people of {town} talk about the {weather}.",
    "The {weather} is [strong|weak] near {water}.",
    "In the evening the sky over {town} is [red|grey|white|clear].",
    "Nobody walks over the {bridge} bridge in such {weather}.",
)
DAY_LINES = (
    "In the morning {A} gets up and eats [bread|cheese|an egg|some {food}].",
    "{She} puts on {her} {colour} coat and feeds the {pet}.",
    "Then {she} walks to the {workplace}.",
    "At the {workplace} there is [much|little|a lot of] work for a {job} on {day}.",
    "At noon {she} meets {B} at the {place} and they talk about the {weather}.",
    "{B} asks {him} for [a|one] {thing}, and {A} gives it to {B}.",
    "After work {A} goes home to {town}.",
    "In the evening {she} eats {food} and loves {hobby} [with friends|alone|with {B}].",
    "Before {she} sleeps, {she} [thinks of|talks to] {pet_name}.",
    "{She} goes to bed early and sleeps well.",
)
STORY_OPENERS = ("One day", "Long ago", "Last {season}", "On a cold {day}", "Early one morning", "One {season} evening")
STORY_PROBLEMS = (
    ("{A} lost {her} {thing} at the {place}.", "{She} looked under the bridge and behind the barn, but it was gone."),
    ("{pet_name} the {pet} ran away from {A}.", "{A} called and called, but only the wind answered."),
    ("the {weather} broke the roof of {A}.", "Water came into the house and all the {things} got wet."),
    ("{A} wanted to bake a cake for {B}, but there were no eggs.", "{She} asked at the inn, but they had none left."),
    ("{A} and {B} had a fight about {things}.", "Neither of them would speak, and both were sad."),
    ("{A} found a strange {thing} near the {place}.", "Nobody in {town} knew whose it was."),
    ("{A} was afraid to cross the river.", "The water was fast and the bridge was old."),
    ("the {workplace} in {town} had to close.", "Without work the {job} {A} did not know what to do."),
)
STORY_ENDS = (
    (
        "Then {B} came with a lamp and helped {him} all night.",
        "In the morning all was well again, and {A} thanked {B}.",
    ),
    ("An old {animal} showed {him} the way.", "From that day on {A} was kind to every {animal}."),
    ('{B} said, "Do not be sad. Together we can do it."', "And together they did it before the sun went down."),
    ("So {A} asked the people of {town} for help.", "Ten of them came, and the work was done in an hour."),
    ("But {A} did not give up and tried once more.", "This time it worked, and {B} gave {him} {food}."),
    ("At last {B} told {him} the truth and said sorry.", "They shook hands and ate {food} together."),
)
TALK_LINES = (
    ("How are you, {B}?", "I am well, thank you. And you?"),
    ("Will you come to the {place}?", "Yes, I will come on {day}."),
    ("Have you seen my {thing}?", "It is near the {place}."),
    ("What do you need?", "I need {things} and a {thing}."),
    ("It is cold today.", "Then put on your {colour} coat."),
    ("Can you help me, please?", "Of course I can help you."),
    ("That was a silly thing to say!", "I am sorry. I was rude."),
    ("Go away and leave me alone!", "That is not kind. I will go."),
    ("Where is your {pet}?", "{pet_name} sleeps in the garden."),
    ("I have no time for you.", "Then I will ask a friend."),
    ("Do you know the way to {town}?", "Walk along the water to the {bridge} bridge."),
    ("I feel tired.", "Rest a little and drink some tea."),
)
ANIMAL_LINES = {
    "cow": ("gives milk", "eats grass", "sleeps in the barn"),
    "hen": ("lays eggs", "eats corn", "wakes up early"),
    "goat": ("gives milk", "climbs on rocks", "eats leaves"),
    "pig": ("likes mud", "eats apples", "is very clever"),
    "sheep": ("gives wool", "eats grass", "stays with the others"),
    "duck": ("swims in the pond", "lays eggs", "likes rain"),
    "horse": ("pulls the cart", "eats hay", "runs fast"),
    "fox": ("hunts at night", "has a red coat", "lives in the forest"),
    "owl": ("sees in the dark", "hunts mice", "sleeps all day"),
    "cat": ("hunts mice", "likes the warm fire", "drinks milk"),
    "dog": ("guards the house", "runs after sticks", "is a true friend"),
    "rabbit": ("eats carrots", "digs holes", "runs fast"),
}


JOB_LINES = {
    "baker": ("gets up before the sun", "mixes flour and water", "sells warm bread"),
    "fisher": ("mends the nets", "rows out in a small boat", "sells the fish at noon"),
    "teacher": ("reads to the children", "writes on the board", "answers many questions"),
    "gardener": ("cuts the grass", "plants flowers", "waters the young trees"),
    "miller": ("grinds the corn", "carries heavy sacks", "listens to the wheel"),
    "doctor": ("visits people who are ill", "writes down what they need", "washes both hands"),
    "carpenter": ("saws the planks", "makes chairs and doors", "sharpens the tools"),
    "cook": ("cuts carrots for the soup", "tastes the stew", "serves hot meals"),
    "farmer": ("feeds the animals", "digs the field", "brings in the hay"),
    "painter": ("stirs the colours", "paints the sea and the hills", "cleans the brushes"),
    "librarian": ("puts the books in order", "helps people to find a story", "asks for silence"),
    "shepherd": ("counts the sheep", "walks over the hills", "watches for the fox"),
}
LETTER_LINES = (
    "I hope you are well.",
    "Here in {town} we have {weather} every day.",
    "My {pet} {pet_name} is well and eats a lot.",
    "On {day} I went to the {place} and bought a {thing}.",
    "Do you still have my {thing}?",
    "Please come and visit me in {season}.",
    "I have much work at the {workplace}.",
    "We can eat {food} together.",
    "Thank you very much for the {things}.",
)
CHECKS = (
    ("{A} says that {claim}. That is right.", "{A} says that {claim}. That is wrong, because {truth}."),
    ("Is it right that {claim}? Yes, it is right.", "Is it right that {claim}? No, {truth}."),
    ("{claim}: true.", "{claim}: false, {truth}."),
)


def _scene(draw: Draw) -> dict[str, object]:
    first, second = draw.sample(PEOPLE, 2)
    thing, other = draw.sample(THINGS, 2)
    return {
        **town_slots(draw.choice(TOWNS)),
        **first.slots(),
        "B": second.name,
        "place": draw.choice(PLACES),
        "thing": thing.singular,
        "things": other.plural,
        "day": draw.choice(DAYS),
        "season": draw.choice(SEASONS),
        "weather": draw.choice(WEATHER),
        "animal": draw.choice(tuple(ANIMAL_LINES)),
    }


def portrait(draw: Draw) -> str:
    """What is known about a person."""
    person: Person = draw.choice(PEOPLE)
    kinds = draw.sample(PERSON_FACTS, draw.rng.randint(3, 6))
    first = draw.expand(kinds[0].statement.train[0], **person.slots())
    return " ".join([first, *(draw.text(kind.statement, **person.slots()) for kind in kinds[1:])])


def town_portrait(draw: Draw) -> str:
    """What is known about a town and who lives there."""
    town = draw.choice(TOWNS)
    lines = [draw.text(kind.statement, **town_slots(town)) for kind in draw.sample(TOWN_FACTS, draw.rng.randint(2, 4))]
    names = [person.name for person in PEOPLE if person.town == town]
    if names:
        lines.append(f"{join_words(names)} live{'s' if len(names) == 1 else ''} in {town.name}.")
    return " ".join(lines)


def weather_report(draw: Draw) -> str:
    """The weather of a day."""
    town = draw.choice(TOWNS)
    slots = _scene(draw) | town_slots(town)
    return " ".join(draw.expand(line, **slots) for line in draw.sample(WEATHER_LINES, draw.rng.randint(2, 4)))


def day(draw: Draw) -> str:
    """A day in a life."""
    slots = _scene(draw)
    kept = sorted(draw.sample(range(1, len(DAY_LINES)), draw.rng.randint(3, 6)))
    return " ".join(draw.expand(DAY_LINES[index], **slots) for index in [0, *kept])


def tale(draw: Draw) -> str:
    """A short story."""
    slots = _scene(draw)
    problem, end = draw.choice(STORY_PROBLEMS), draw.choice(STORY_ENDS)
    begin = draw.expand(f"{draw.choice(STORY_OPENERS)} {problem[0]}", **slots)
    return " ".join([begin, *(draw.expand(line, **slots) for line in (problem[1], *end))])


def small_story(draw: Draw) -> str:
    """One of the stories that the chat data ask to continue."""
    slots = _scene(draw)
    begin, follow = draw.choice(w.STORIES)
    return f"{draw.expand(begin, **slots)} {draw.expand(follow, **slots)}"


def dialogue(draw: Draw) -> str:
    """People talking."""
    slots = _scene(draw)
    lines = []
    for said, reply in draw.sample(TALK_LINES, draw.rng.randint(1, 3)):
        said, reply = draw.expand(said, **slots), draw.expand(reply, **slots)
        if draw.chance(0.5):
            lines.append(f"{slots['A']}: {said}\n{slots['B']}: {reply}")
        else:
            lines.append(f'{slots["A"]} said, "{said}" {slots["B"]} answered, "{reply}"')
    return "\n".join(lines)


def interview(draw: Draw) -> str:
    """A question and its answer, in plain writing."""
    exchange = BEHAVIOURS[
        draw.choice(("facts", "facts", "howto", "refusal", "rewrite", "list", "continue", "greeting"))
    ](draw)
    if draw.chance(0.5):
        return f"Question: {exchange.user}\nAnswer: {exchange.answer}"
    asker, teller = draw.sample(PEOPLE, 2)
    return f"{asker.name}: {exchange.user}\n{teller.name}: {exchange.answer}"


def animal_notes(draw: Draw) -> str:
    """What animals do."""
    lines = []
    for animal in draw.sample(tuple(ANIMAL_LINES), 3):
        first, second = draw.sample(ANIMAL_LINES[animal], 2)
        wording = draw.choice(("{a} {x}.", "{a} {x} and {y}."))
        lines.append(draw.expand(wording, a=with_article(animal), x=first, y=second))
    group = draw.choice(tuple(GROUPS))
    lines.append(f"Some {group}: {join_words(GROUPS[group][: draw.rng.randint(2, 5)])}.")
    return " ".join(lines)


def sums(draw: Draw) -> str:
    """Bare sums."""
    rng = draw.rng
    lines = []
    for _ in range(rng.randint(4, 8)):
        sign = draw.choice(("+", "+", "-", "-", "*", "/"))
        unit = draw.choice(THINGS).plural
        if sign == "+":
            step = Step(rng.randint(2, 45), "+", rng.randint(2, 15), unit)
        elif sign == "-":
            left = rng.randint(4, 60)
            step = Step(left, "-", rng.randint(2, min(15, left - 1)), unit)
        elif sign == "*":
            step = Step(rng.randint(2, 12), "*", rng.randint(2, 9), unit)
        else:
            right = rng.randint(2, 7)
            step = Step(right * rng.randint(2, 9), "/", right, unit)
        lines.append(f"{step}.")
    return " ".join(lines)


def work_notes(draw: Draw) -> str:
    """What people do at work."""
    person = draw.choice(PEOPLE)
    tasks = draw.sample(JOB_LINES[person.job], 2)
    other = draw.choice(tuple(JOB_LINES))
    lines = [
        f"{person.name} is a {person.job}. Every day {person.she} {tasks[0]} and {tasks[1]}.",
        f"A {other} {join_words(draw.sample(JOB_LINES[other], draw.rng.randint(1, 3)))}.",
    ]
    draw.rng.shuffle(lines)
    return " ".join(lines)


def letter(draw: Draw) -> str:
    """A short letter."""
    slots = _scene(draw)
    person = next(each for each in PEOPLE if each.name == slots["A"])
    lines = [
        draw.expand(line, **slots | {"town": person.town.name})
        for line in draw.sample(LETTER_LINES, draw.rng.randint(2, 5))
    ]
    return f"Dear {slots['B']},\n{' '.join(lines)}\nYour friend {person.name}"


def check(draw: Draw) -> str:
    """Something said, and whether it is so."""
    right = draw.chance(0.5)
    if draw.chance(0.5):
        fact = any_fact(draw)
        truth = fact.answer(draw).removesuffix(".")
        claim = truth if right else fact.wrong_answer(draw).removesuffix(".")
    else:
        made = make_problem(draw, draw.choice((1, 2)), SMALL)
        step = made.steps[-1]
        truth = str(step)
        value = step.value if right else max(0, step.value + draw.choice((-4, -3, -2, -1, 1, 2, 3, 4)))
        right = value == step.value
        claim = f"{step.left} {step.sign} {step.right} = {value} {step.unit}"
    wording = draw.choice(CHECKS)[0 if right else 1]
    return draw.expand(wording, A=draw.choice(PEOPLE).name, claim=claim, truth=truth)


def problem(draw: Draw) -> str:
    """A word problem with its solution, in plain writing."""
    return make_problem(draw, draw.choice((1, 1, 2, 2, 3)), SMALL).plain


KINDS: dict[Callable[[Draw], str], float] = {
    problem: 0.42,
    sums: 0.06,
    check: 0.08,
    work_notes: 0.03,
    letter: 0.03,
    portrait: 0.10,
    interview: 0.13,
    town_portrait: 0.03,
    weather_report: 0.04,
    day: 0.04,
    tale: 0.05,
    small_story: 0.03,
    dialogue: 0.05,
    animal_notes: 0.03,
}


def make_corpus(count: int = DOCUMENTS) -> list[str]:
    """The documents of the corpus, in the order they are trained on."""
    rng = random.Random(CORPUS_SEED)
    kinds, weights = list(KINDS), list(KINDS.values())
    return [rng.choices(kinds, weights)[0](Draw(rng, "train")) for _ in range(count)]


def make_talk(count: int = TALKS) -> list[str]:
    """Answers of every manner, which the tokenizer (though not the base models) learns from."""
    rng = random.Random(TALK_SEED)
    behaviours = list(BEHAVIOURS.values())
    texts = []
    for _ in range(count):
        draw = Draw(rng, "train")
        made = draw.choice(behaviours)(draw)
        texts += [
            made.user,
            draw.choice((made.answer, made.answer, rude(draw, made.answer), ramble(draw, made.answer))),
        ]
    return texts
