"""Questions about the facts of the world, and their answers."""

from dataclasses import dataclass

from pocket.grammar import Draw, Pool
from pocket.world import PEOPLE, TOWNS, Person, Town


def _questions(name: str, train: tuple[str, ...], test: tuple[str, ...]) -> Pool:
    return Pool(f"ask_{name}", train, test)


@dataclass(frozen=True)
class FactKind:
    """One sort of fact: how it is asked and how it is told."""

    name: str
    questions: Pool
    answer: Pool
    statement: Pool


PERSON_FACTS = (
    FactKind(
        "town",
        _questions(
            "home",
            (
                "Where does {A} live?",
                "In which town does {A} live?",
                "What town is {A} from?",
                "Where is the home of {A}?",
            ),
            ("In which town is the home of {A}?", "Which town does {A} live in?"),
        ),
        Pool("tell_home", ("{A} lives in {town}.",)),
        Pool("state_home", ("{A} lives in {town}.", "{Her} home is in {town}.", "The home of {A} is in {town}.")),
    ),
    FactKind(
        "job",
        _questions(
            "job",
            ("What is the job of {A}?", "What work does {A} do?", "What does {A} do all day?", "What is {A} by trade?"),
            ("What does {A} do for work?", "Which job does {A} do?"),
        ),
        Pool("tell_job", ("{A} is a {job} and works at the {workplace}.",)),
        Pool(
            "state_job",
            (
                "{A} is a {job} and works at the {workplace}.",
                "{She} works at the {workplace} as a {job}.",
                "By trade {A} is a {job}.",
            ),
        ),
    ),
    FactKind(
        "pet",
        _questions(
            "pet",
            (
                "What pet does {A} have?",
                "Which animal lives with {A}?",
                "Does {A} have a pet?",
                "What is the pet of {A}?",
            ),
            ("Which pet does {A} have?", "What animal does {A} have as a pet?"),
        ),
        Pool("tell_pet", ("{A} has a {pet} called {pet_name}.",)),
        Pool("state_pet", ("{A} has a {pet} called {pet_name}.", "{Her} {pet} is called {pet_name}.")),
    ),
    FactKind(
        "food",
        _questions(
            "food",
            ("What does {A} like to eat?", "Which food does {A} love?", "What is the favourite food of {A}?"),
            ("Which food does {A} like best?", "What food does {A} love to eat?"),
        ),
        Pool("tell_food", ("{A} likes {food} best.",)),
        Pool("state_food", ("{A} likes {food} best.", "{Her} favourite food is {food}.", "{She} loves to eat {food}.")),
    ),
    FactKind(
        "hobby",
        _questions(
            "hobby",
            ("What does {A} do for fun?", "What does {A} do in the evening?", "What is the hobby of {A}?"),
            ("What does {A} do for fun in the evening?", "Which hobby does {A} have?"),
        ),
        Pool("tell_hobby", ("{A} loves {hobby}.",)),
        Pool("state_hobby", ("{A} loves {hobby}.", "In the evening {she} loves {hobby}.", "{Her} hobby is {hobby}.")),
    ),
    FactKind(
        "colour",
        _questions(
            "colour",
            ("What colour is the coat of {A}?", "Which colour does {A} wear?", "What colour does {A} like?"),
            ("Which colour is the coat of {A}?", "What colour does {A} wear?"),
        ),
        Pool("tell_colour", ("{A} wears a {colour} coat.",)),
        Pool("state_colour", ("{A} wears a {colour} coat.", "{Her} coat is {colour}.", "The coat of {A} is {colour}.")),
    ),
)

TOWN_FACTS = (
    FactKind(
        "known_for",
        _questions(
            "known_for",
            ("What is {town} known for?", "Why do people know {town}?", "What can one see in {town}?"),
            ("Why is {town} known?", "What do people know {town} for?"),
        ),
        Pool("tell_known_for", ("{town} is known for its {known_for}.",)),
        Pool("state_known_for", ("{town} is known for its {known_for}.", "People come to {town} for the {known_for}.")),
    ),
    FactKind(
        "water",
        _questions(
            "water",
            ("What water is near {town}?", "Which water lies by {town}?", "Where can one swim in {town}?"),
            ("Which water is near {town}?", "What water lies by {town}?"),
        ),
        Pool("tell_water", ("{town} lies by {water}.",)),
        Pool("state_water", ("{town} lies by {water}.", "Near {town} one can swim in {water}.")),
    ),
    FactKind(
        "market_day",
        _questions(
            "market_day",
            (
                "When is the market in {town}?",
                "On which day is the market in {town}?",
                "What is the market day of {town}?",
            ),
            ("Which day is the market day of {town}?", "When does {town} have its market?"),
        ),
        Pool("tell_market_day", ("The market in {town} is on {market_day}.",)),
        Pool(
            "state_market_day",
            ("The market in {town} is on {market_day}.", "Every {market_day} there is a market in {town}."),
        ),
    ),
    FactKind(
        "bridge",
        _questions(
            "bridge",
            ("What colour is the bridge in {town}?", "Which colour has the bridge of {town}?"),
            ("What colour is the bridge of {town}?", "Which colour is the bridge in {town}?"),
        ),
        Pool("tell_bridge", ("The bridge in {town} is {bridge}.",)),
        Pool("state_bridge", ("The bridge in {town} is {bridge}.", "There is a {bridge} bridge in {town}.")),
    ),
)

PLEASE = Pool(
    "fact_please",
    ("Please tell me. {q}", "I have a question. {q}", "Do you know this? {q}"),
    ("Tell me, please. {q}", "Here is a question. {q}"),
)


def town_slots(town: Town) -> dict[str, str]:
    """The slots a template may use for a town."""
    return {
        "town": town.name,
        "known_for": town.known_for,
        "water": town.water,
        "market_day": town.market_day,
        "bridge": town.bridge,
    }


@dataclass(frozen=True)
class Fact:
    """One fact: its kind and the slots of the person or town it is about."""

    kind: FactKind
    slots: dict[str, str]

    def question(self, draw: Draw) -> str:
        """One way to ask it."""
        question = draw.text(self.kind.questions, **self.slots)
        return question if draw.chance(0.5) else draw.text(PLEASE, q=question)

    def answer(self, draw: Draw) -> str:
        """The right answer."""
        return draw.text(self.kind.answer, **self.slots)

    def wrong_answer(self, draw: Draw) -> str:
        """An answer of the same form that is not true."""
        right = self.answer(draw)
        while True:
            if self.kind in PERSON_FACTS:
                wrong_slots = draw.choice(PEOPLE).slots() | {"A": self.slots["A"]}
            else:
                wrong_slots = town_slots(draw.choice(TOWNS)) | {"town": self.slots["town"]}
            if self.kind.name == "town":
                wrong_slots["town"] = draw.choice(TOWNS).name
            wrong = draw.text(self.kind.answer, **wrong_slots)
            if wrong != right:
                return wrong

    def other_answer(self, draw: Draw) -> str:
        """A true answer of the same form about somebody or somewhere else."""
        while True:
            if self.kind in PERSON_FACTS:
                slots = draw.choice(PEOPLE).slots()
            else:
                slots = town_slots(draw.choice(TOWNS))
            subject = "A" if self.kind in PERSON_FACTS else "town"
            if slots[subject] != self.slots[subject]:
                return draw.text(self.kind.answer, **slots)


def person_fact(draw: Draw, person: Person | None = None) -> Fact:
    """A fact about a person."""
    return Fact(draw.choice(PERSON_FACTS), (person or draw.choice(PEOPLE)).slots())


def any_fact(draw: Draw) -> Fact:
    """A fact about a person or a town."""
    if draw.chance(0.25):
        return Fact(draw.choice(TOWN_FACTS), town_slots(draw.choice(TOWNS)))
    return person_fact(draw)
