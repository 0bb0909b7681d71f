"""The behaviours of the chat data: every one makes a user turn and a good answer to it."""

from collections.abc import Callable
from dataclasses import dataclass

from pocket import wordings as w
from pocket.facts import Fact, any_fact, person_fact
from pocket.grammar import Draw, join_words, lower_first
from pocket.problems import Problem, make_problem
from pocket.world import DAYS, GROUPS, PEOPLE, PLACES, THINGS


@dataclass(frozen=True)
class Exchange:
    """One user turn and its good answer, with what it was made from where that is needed again."""

    behaviour: str
    user: str
    answer: str
    problem: Problem | None = None
    fact: Fact | None = None


def facts(draw: Draw) -> Exchange:
    """A question about the world."""
    fact = any_fact(draw)
    return Exchange("facts", fact.question(draw), fact.answer(draw), fact=fact)


def maths(draw: Draw) -> Exchange:
    """A word problem."""
    problem = make_problem(draw, draw.choice((1, 1, 2, 2, 3)))
    return Exchange("maths", problem.question, problem.solution, problem=problem)


def howto(draw: Draw) -> Exchange:
    """How to do something, or what to do about something."""
    name = draw.choice(PEOPLE).name
    if draw.chance(0.3):
        feeling, advice = draw.choice(w.ADVICE)
        return Exchange("howto", draw.text(w.ASK_ADVICE, feeling=feeling, name=name), advice)
    task, steps = draw.choice(w.TASKS)
    user = draw.text(w.ASK_HOWTO, task=task, name=name)
    first, second, third = (lower_first(step) for step in steps)
    return Exchange("howto", user, draw.text(w.TELL_HOWTO, task=task, first=first, second=second, third=third))


def refusal(draw: Draw) -> Exchange:
    """An unkind wish, which is declined politely."""
    person = draw.choice(PEOPLE)
    deed, reason, instead = draw.choice(w.UNKIND)
    thing = draw.choice(THINGS).plural
    slots = {"B": person.name, "thing": thing, "him": person.him, "her": person.her, "pet": person.pet}
    deed, reason, instead = (part.format_map(slots) for part in (deed, reason, instead))
    user = draw.text(w.ASK_UNKIND, deed=deed)
    return Exchange("refusal", user, draw.text(w.DECLINE, reason=reason, instead=instead))


def rewrite(draw: Draw) -> Exchange:
    """Say the same in another way."""
    person = draw.choice(PEOPLE)
    place = draw.choice(PLACES)
    thing = draw.choice(THINGS).plural
    if draw.chance(0.5):
        now, past = draw.choice(w.VERBS)
        tail = draw.choice(w.VERB_TAILS).format(place=place, thing=thing, day=draw.choice(DAYS))
        user = draw.text(w.ASK_PAST, s=f"{person.name} {now} {tail}.")
        return Exchange("rewrite", user, f"{person.name} {past} {tail}.")
    bare = draw.choice(w.COMMANDS).format(thing=thing, place=place, B=person.name)
    user = draw.text(w.ASK_POLITE, s=f"{bare}!")
    return Exchange("rewrite", user, f"Could you please {lower_first(bare)}?")


def listing(draw: Draw) -> Exchange:
    """A list, of things named in the question or of things known."""
    if draw.chance(0.5):
        things = [thing.plural for thing in draw.sample(THINGS, 3)]
        user = draw.text(w.ASK_LIST_GIVEN, A=draw.choice(PEOPLE).name, things=join_words(things))
        return Exchange("list", user, "\n".join(f"- {thing}" for thing in things))
    group = draw.choice(tuple(GROUPS))
    count = draw.choice((2, 3, 4))
    user = draw.text(w.ASK_LIST_KNOWN, count={2: "two", 3: "three", 4: "four"}[count], group=group)
    return Exchange("list", user, "\n".join(f"- {member}" for member in GROUPS[group][:count]))


def story(draw: Draw) -> Exchange:
    """A story begun, to be continued."""
    first, second = draw.sample(PEOPLE, 2)
    slots = {**first.slots(), "B": second.name, "place": draw.choice(PLACES), "thing": draw.choice(THINGS).singular}
    begin, follow = draw.choice(w.STORIES)
    user = draw.text(w.ASK_CONTINUE, s=begin.format_map(slots))
    return Exchange("continue", user, draw.expand(follow, **slots))


def greeting(draw: Draw) -> Exchange:
    """A greeting."""
    name = draw.choice(PEOPLE).name
    time = draw.choice(("morning", "day", "evening"))
    return Exchange("greeting", draw.text(w.GREET, name=name, time=time), draw.text(w.GREET_BACK, name=name, time=time))


def thanks(draw: Draw) -> Exchange:
    """A word of thanks, which follows an earlier answer."""
    return Exchange("greeting", draw.text(w.THANK), draw.text(w.WELCOME))


BEHAVIOURS: dict[str, Callable[[Draw], Exchange]] = {
    "facts": facts,
    "maths": maths,
    "howto": howto,
    "refusal": refusal,
    "rewrite": rewrite,
    "list": listing,
    "continue": story,
    "greeting": greeting,
}


def second_fact(draw: Draw, first: Fact) -> Exchange:
    """Another question about the person that the first one was about."""
    people = [person for person in PEOPLE if person.name == first.slots.get("A")]
    fact = person_fact(draw, people[0] if people else None)
    return Exchange("facts", fact.question(draw), fact.answer(draw), fact=fact)
