"""The small world that pocket speaks about: its towns, people, animals and things, all of them invented here."""

import random
from dataclasses import dataclass

WORLD_SEED = 7


@dataclass(frozen=True)
class Town:
    """A town and the four things that everybody knows about it."""

    name: str
    known_for: str
    water: str
    market_day: str
    bridge: str


@dataclass(frozen=True)
class Person:
    """A person and the things that everybody knows about them."""

    name: str
    she: str
    her: str
    job: str
    workplace: str
    town: Town
    pet: str
    pet_name: str
    food: str
    hobby: str
    colour: str

    @property
    def him(self) -> str:
        """The object pronoun."""
        return "her" if self.she == "she" else "him"

    def slots(self) -> dict[str, str]:
        """The slots a template may use for this person."""
        return {
            "A": self.name,
            "she": self.she,
            "She": self.she.capitalize(),
            "her": self.her,
            "Her": self.her.capitalize(),
            "him": self.him,
            "job": self.job,
            "workplace": self.workplace,
            "town": self.town.name,
            "pet": self.pet,
            "pet_name": self.pet_name,
            "food": self.food,
            "hobby": self.hobby,
            "colour": self.colour,
        }


@dataclass(frozen=True)
class Thing:
    """A thing that can be counted."""

    singular: str
    plural: str
    box: str
    boxes: str


DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
SEASONS = ("spring", "summer", "autumn", "winter")
COLOURS = ("red", "blue", "green", "yellow", "white", "brown", "grey", "orange")
HOBBIES = ("singing", "swimming", "drawing", "dancing", "reading", "fishing", "knitting", "climbing")
FOODS = (
    "bean soup",
    "plum cake",
    "fried fish",
    "apple pie",
    "cheese bread",
    "honey toast",
    "corn stew",
    "carrot salad",
)
PETS = ("cat", "dog", "goat", "hen", "rabbit", "duck", "pony", "parrot")
PET_NAMES = (
    "Biscuit",
    "Button",
    "Pepper",
    "Clover",
    "Mango",
    "Pickle",
    "Copper",
    "Daisy",
    "Marble",
    "Nutmeg",
    "Pebble",
    "Rusty",
    "Sparky",
    "Tansy",
    "Velvet",
    "Waffle",
    "Ziggy",
    "Bramble",
    "Comet",
    "Dumpling",
    "Feather",
    "Ginger",
    "Hazel",
    "Juniper",
)
JOBS = (
    ("baker", "bakery"),
    ("fisher", "harbour"),
    ("teacher", "school"),
    ("gardener", "park"),
    ("miller", "mill"),
    ("doctor", "clinic"),
    ("carpenter", "workshop"),
    ("cook", "inn"),
    ("farmer", "farm"),
    ("painter", "studio"),
    ("librarian", "library"),
    ("shepherd", "hill"),
)
NAMES = (
    ("Nora", "she"),
    ("Tom", "he"),
    ("Ida", "she"),
    ("Ben", "he"),
    ("Lena", "she"),
    ("Max", "he"),
    ("Ruth", "she"),
    ("Sam", "he"),
    ("Vera", "she"),
    ("Finn", "he"),
    ("Clara", "she"),
    ("Hugo", "he"),
    ("Mina", "she"),
    ("Otto", "he"),
    ("Rosa", "she"),
    ("Leo", "he"),
    ("Tilda", "she"),
    ("Jon", "he"),
    ("Edith", "she"),
    ("Karl", "he"),
    ("Anya", "she"),
    ("Piet", "he"),
    ("Greta", "she"),
    ("Amos", "he"),
)
TOWNS = (
    Town("Mossford", "old stone walls", "the river Tarn", "Monday", "red"),
    Town("Fernley", "tall green trees", "the lake Ullen", "Tuesday", "white"),
    Town("Saltwick", "small fishing boats", "the North Sea", "Wednesday", "blue"),
    Town("Oakmere", "sweet yellow pears", "the pond Mere", "Thursday", "brown"),
    Town("Brindle", "warm wool blankets", "the stream Nettle", "Friday", "grey"),
    Town("Larkhill", "loud brass bells", "the river Dunn", "Saturday", "green"),
)
PLACES = (
    "market",
    "mill",
    "harbour",
    "school",
    "bakery",
    "library",
    "park",
    "farm",
    "inn",
    "bridge",
    "forest",
    "hill",
    "garden",
    "station",
    "barn",
    "beach",
)
THINGS = tuple(
    Thing(singular, plural, box, boxes)
    for singular, plural, box, boxes in (
        ("apple", "apples", "basket", "baskets"),
        ("pear", "pears", "basket", "baskets"),
        ("egg", "eggs", "box", "boxes"),
        ("shell", "shells", "bucket", "buckets"),
        ("book", "books", "shelf", "shelves"),
        ("candle", "candles", "box", "boxes"),
        ("button", "buttons", "jar", "jars"),
        ("coin", "coins", "bag", "bags"),
        ("nail", "nails", "box", "boxes"),
        ("plum", "plums", "bowl", "bowls"),
        ("card", "cards", "pile", "piles"),
        ("stone", "stones", "bucket", "buckets"),
        ("carrot", "carrots", "bag", "bags"),
        ("bean", "beans", "jar", "jars"),
        ("cup", "cups", "shelf", "shelves"),
        ("rope", "ropes", "cart", "carts"),
        ("flower", "flowers", "vase", "vases"),
        ("fish", "fish", "bucket", "buckets"),
        ("cake", "cakes", "plate", "plates"),
        ("pencil", "pencils", "jar", "jars"),
    )
)
GROUPS = {
    "animals on a farm": ("cow", "hen", "goat", "pig", "sheep", "duck", "horse"),
    "kinds of fruit": ("apple", "pear", "plum", "cherry", "berry", "melon"),
    "kinds of weather": ("rain", "snow", "wind", "fog", "sun", "hail"),
    "things in a kitchen": ("pot", "pan", "spoon", "cup", "plate", "knife"),
    "things in a workshop": ("hammer", "saw", "nail", "rope", "plank", "brush"),
    "animals in the forest": ("fox", "owl", "deer", "hare", "badger", "mouse"),
    "things you can wear": ("coat", "hat", "scarf", "shirt", "boot", "glove"),
    "things in the garden": ("flower", "bean", "rake", "fence", "tree", "gate"),
    "days of the week": ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"),
    "colours": ("red", "blue", "green", "yellow", "white", "brown"),
    "towns near the hills": ("Mossford", "Fernley", "Oakmere", "Brindle", "Larkhill"),
    "jobs in the town": ("baker", "teacher", "doctor", "farmer", "cook", "painter"),
}


def _people() -> tuple[Person, ...]:
    rng = random.Random(WORLD_SEED)
    pet_names = list(PET_NAMES)
    rng.shuffle(pet_names)
    columns: list[list[object]] = []
    for values in (JOBS, TOWNS, PETS, FOODS, HOBBIES, COLOURS):
        column: list[object] = [values[index % len(values)] for index in range(len(NAMES))]
        rng.shuffle(column)
        columns.append(column)
    people = []
    for index, (name, she) in enumerate(NAMES):
        job, town, pet, food, hobby, colour = (column[index] for column in columns)
        assert isinstance(job, tuple) and isinstance(town, Town)
        her = "her" if she == "she" else "his"
        people.append(
            Person(name, she, her, job[0], job[1], town, str(pet), pet_names[index], str(food), str(hobby), str(colour))
        )
    return tuple(people)


PEOPLE = _people()
