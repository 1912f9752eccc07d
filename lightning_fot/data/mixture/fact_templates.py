"""What the source ``facts`` says: names, values, and sentences that tell and ask, in the words told and in others.

``{k}`` is the name, which tells facts of one relation apart; the value follows the text. Left out on purpose, so that
a measurement has what no training saw: secret codes, silver keys, ferries and bakers, and the cities and names that
``benchmarks/lookup.py`` uses.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

Value = Callable[[random.Random], str]


def _words(text: str) -> list[str]:
    return text.split()


def _listed(text: str) -> list[str]:
    return text.split(";")


_FIRST = _words(
    "Alice Ben Clara David Emma Felix Grace Henry Irene Jack Karen Liam Maria Nathan Olivia Peter Quentin Rachel "
    "Samuel Teresa Ulrich Victor Wendy Xavier Yvonne Zoe Arthur Bridget Cecil Dorothy Edgar Frances Gilbert "
    "Harriet Isaac Julia Kenneth Laura Martin Nora Oscar Paula Ralph Sylvia Thomas Ursula Vincent Walter Agnes "
    "Bernard Camille Dmitri Elena Fatima Giovanni Hassan Ines Jorge Keiko Lars Mei Nadia Omar Priya Rashid Sofia "
    "Tariq Uma Viktor Yusuf Zara Aiko Boris Carmen Diego Esther Fiona George Hugo Ivan Jasmine Klaus Lucia "
    "Miguel Ngozi Otto Pablo Rosa Stefan Tomas Vera"
)
_LAST = _words(
    "Adams Baker Carter Dawson Ellis Fletcher Graham Hughes Ingram Jenkins Keller Lawson Mason Nelson Owens "
    "Porter Quinn Reed Sanders Turner Underwood Vaughn Watson Young Zimmer Ahmed Bianchi Chen Diaz Eriksson "
    "Fischer Garcia Haddad Ivanov Jansen Kowalski Lopez Moreau Nakamura Olsen Patel Rossi Santos Tanaka Ueda "
    "Vargas Weber Yamada Anderson Brooks Clarke Douglas Evans Foster Gordon Harris Irving Johnson Kaplan Lambert "
    "Morgan Norton Parker Richter Schmidt Taylor"
)
_TOWNS = _words(
    "London Berlin Madrid Vienna Athens Dublin Prague Warsaw Lisbon Helsinki Boston Chicago Denver Seattle "
    "Houston Miami Toronto Sydney Mumbai Nairobi Lagos Tehran Baghdad Hanoi Seoul Beijing Geneva Munich Hamburg "
    "Milan Naples Venice Seville Porto Bristol Oxford Cambridge York Dover Exeter Glasgow Cardiff Belfast Cork "
    "Utrecht Antwerp Bruges Krakow Budapest Belgrade Sofia Riga Tallinn Vilnius Kiev Odessa Tbilisi Ankara Tunis "
    "Rabat Dakar Havana Bogota Santiago Montreal Dallas Austin Phoenix Portland Memphis Nashville Atlanta Newark "
    "Albany"
)
_SYLLABLES = _words(
    "ba be bo bra da del dor du fa fen gal gor ha hol ka kel kor la lin lo mar mel mo na ner no pa per ra ren ro "
    "sa sel sto ta tal ter to va ven vor wa wel za zen zo"
)
_ENDS = _words("n r s th ld rn k m nd x ville ton burg field ford dale port")
_COLOURS = _words(
    "red blue green yellow purple orange black white brown grey pink golden crimson violet turquoise scarlet"
)
_THINGS = _words(
    "lamp chair table mirror clock basket violin kettle ladder hammer bucket carpet drawer candle bottle window "
    "shelf cabinet suitcase umbrella pillow blanket painting statue vase desk trunk barrel wagon bicycle piano "
    "stove bench crate lantern telescope globe easel harp loom anvil cradle"
)
_FOODS = _listed(
    "lentil soup;apple pie;fried rice;roast chicken;onion bread;plum cake;fish stew;goat cheese;mushroom risotto;"
    "bean salad;pumpkin curry;beef dumplings;rhubarb jam;tomato omelette;spinach pancakes;ginger biscuits;barley "
    "porridge;duck pie;cherry tart;potato noodles;cabbage rolls;honey cake;walnut bread;shrimp tacos"
)
_JOBS = _listed(
    "teacher;plumber;lawyer;carpenter;nurse;tailor;gardener;pilot;butcher;librarian;glass blower;watchmaker;"
    "court clerk;violin teacher;bus driver;geologist;translator;dentist;shepherd;photographer;blacksmith;"
    "accountant;harbour master;beekeeper;stone mason;chemist;postman;sculptor;cook;journalist"
)
_ANIMALS = _words(
    "otter heron badger falcon rabbit tortoise donkey parrot beaver lynx ferret pelican hedgehog moose weasel "
    "raven camel goat stork salmon lizard walrus bison magpie squirrel panther"
)
_INSTRUMENTS = _words(
    "cello flute trumpet harp oboe banjo accordion clarinet drums trombone mandolin organ lute bassoon zither viola"
)
_MONTHS = _words("January February March April May June July August September October November December")
_DAYS = _words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
_SPOTS = _listed(
    "kitchen;attic;cellar;library;stable;greenhouse;chapel;garage;laundry room;upper hall;old mill;north tower;"
    "music room;tool shed;guest room;back yard;wood shed;post office;town hall;railway station;dairy;orchard;"
    "pantry;school yard"
)
_ADJECTIVES = _words(
    "quiet broken ancient narrow bitter gentle hollow rapid silver frozen distant clever crooked velvet wooden "
    "hidden patient stubborn brilliant lonely restless faded polished tangled"
)
_NOUNS = _words(
    "river mountain harbour forest meadow bridge castle valley winter summer thunder shadow feather compass "
    "anchor garden engine letter promise journey island orchard mirror kingdom sparrow canyon voyage market"
)
_MATERIALS = _words("copper oak marble silk wool leather granite bamboo iron linen clay ivory amber slate tin brass")
_SUBJECTS = _listed(
    "botany;medieval history;algebra;music theory;organic chemistry;naval law;astronomy;grammar;economics;"
    "anatomy;map making;philosophy;optics;pottery;metallurgy;architecture"
)


def _digits(low: int, high: int) -> Value:
    def draw(random: random.Random) -> str:
        length = random.randint(low, high)
        return str(random.randint(10 ** (length - 1), 10**length - 1))

    return draw


def _one_of(values: list[str]) -> Value:
    return lambda random: random.choice(values)


def _person(random: random.Random) -> str:
    return random.choice(_FIRST) if random.random() < 0.5 else f"{random.choice(_FIRST)} {random.choice(_LAST)}"


def _full_name(random: random.Random) -> str:
    return f"{random.choice(_FIRST)} {random.choice(_LAST)}"


def _animal(random: random.Random) -> str:
    return f"{random.choice(_COLOURS)} {random.choice(_ANIMALS)} called {_invented(random)}"


def _surname(random: random.Random) -> str:
    return random.choice(_LAST)


def _invented(random: random.Random) -> str:
    return ("".join(random.choices(_SYLLABLES, k=random.randint(2, 3))) + random.choice(_ENDS)).capitalize()


def _town(random: random.Random) -> str:
    return random.choice(_TOWNS) if random.random() < 0.6 else _invented(random)


def _thing(random: random.Random) -> str:
    return f"the {random.choice(_COLOURS + _MATERIALS)} {random.choice(_THINGS)}"


def _project(random: random.Random) -> str:
    return f"Project {random.choice(_NOUNS if random.random() < 0.5 else _ANIMALS).capitalize()}"


def _room(random: random.Random) -> str:
    return f"room {random.randint(1, 480)}"


def _device(random: random.Random) -> str:
    kind = random.choice(["server", "machine", "printer", "sensor", "router"])
    return f"{kind} {random.choice('ABCDEFGHKLMNPRST')}{random.randint(1, 99)}"


def _time(random: random.Random) -> str:
    return f"{random.randint(1, 12)}:{random.randint(0, 59):02d}"


def _date(random: random.Random) -> str:
    return f"{random.randint(1, 28)} {random.choice(_MONTHS)}"


def _year(random: random.Random) -> str:
    return str(random.randint(1500, 2030))


def _price(random: random.Random) -> str:
    return f"{random.randint(2, 950)} {random.choice(['dollars', 'euros', 'crowns', 'pounds'])}"


def _length(random: random.Random) -> str:
    return f"{random.randint(2, 900)} {random.choice(['metres', 'miles', 'feet', 'kilometres'])}"


def _weight(random: random.Random) -> str:
    return f"{random.randint(2, 900)} {random.choice(['kilograms', 'grams', 'pounds', 'tons'])}"


def _letters(random: random.Random) -> str:
    return "".join(random.choices("ABCDEFGHJKLMNPQRSTUVWXYZ", k=2)) + f"-{random.randint(100, 9999)}"


def _phrase(random: random.Random) -> str:
    return f"{random.choice(_ADJECTIVES)} {random.choice(_NOUNS)}"


def _motto(random: random.Random) -> str:
    return f"every {random.choice(_ADJECTIVES)} {random.choice(_NOUNS)} needs a {_phrase(random)}"


def _colour_thing(random: random.Random) -> str:
    return f"{random.choice(_COLOURS)} {random.choice(_THINGS)}"


@dataclass(frozen=True)
class Relation:
    """Facts of one kind: ``told`` are beginnings that the value ends, ``asked`` the same in other words.

    Args:
        key: Draws a name.
        value: Draws a value.
        told: Beginnings of sentences that tell.
        asked: Beginnings that ask in other words.
        after: Follows the value where a sentence tells.
    """

    key: Value
    value: Value
    told: tuple[str, ...]
    asked: tuple[str, ...]
    after: str = "."


# What belongs to a name, by several nouns of one meaning.
_ATTRIBUTES: tuple[tuple[Value, Value, str], ...] = (
    (_town, _digits(5, 7), "access number;entry code;door code"),
    (_person, _digits(5, 7), "pin;personal number;login number"),
    (_person, _digits(6, 8), "phone number;telephone number;number to call"),
    (_device, _letters, "serial number;inventory label;identifier"),
    (_project, _phrase, "code name;internal name;nickname"),
    (_person, _phrase, "password;passphrase;magic word"),
    (_project, _full_name, "leader;head;person in charge"),
    (_town, _full_name, "mayor;head of the town;chief official"),
    (_town, _digits(5, 7), "population;number of inhabitants;number of people"),
    (_town, _digits(5, 5), "postal code;zip code;mailing code"),
    (_thing, _price, "price;cost;amount to pay"),
    (_thing, _weight, "weight;mass;load"),
    (_invented, _length, "height;elevation;vertical size"),
    (_invented, _full_name, "owner;proprietor;possessor"),
    (_person, _invented, "birthplace;place of birth;native town"),
    (_person, _date, "birthday;day of birth;date of birth"),
    (_person, _colour_thing, "favourite thing;preferred object;best liked thing"),
    (_person, _one_of(_FOODS), "favourite dish;preferred meal;best liked food"),
    (_person, _animal, "pet;house animal;animal at home"),
    (_person, _one_of(_JOBS), "job;profession;occupation"),
    (_person, _full_name, "best friend;closest companion;dearest friend"),
    (_person, _digits(3, 5), "locker number;number of the locker;locker"),
    (_project, _date, "deadline;due date;last day"),
    (_device, _digits(2, 5), "port;port number;network port"),
    (_town, _phrase, "emblem;symbol;sign"),
    (_invented, _motto, "motto;guiding sentence;slogan"),
    (_town, _year, "year of foundation;founding year;first year"),
    (_room, _full_name, "guest;occupant;tenant"),
    (_room, _colour_thing, "most valuable object;greatest treasure;dearest thing"),
    (_invented, _invented, "capital;main city;seat of government"),
    (_invented, _digits(2, 4), "flight number;number of the flight;flight"),
    (_device, _invented, "location;site;whereabouts"),
)
_TOLD = (
    "The {a} of {k} is",
    "{K}'s {a} is",
    "For {k}, the {a} is",
    "As for {k}, the {a} is",
    "The {a} for {k} is",
    "It is known that the {a} of {k} is",
    "{K} - {a}:",
    "Remember that the {a} of {k} is",
    "{K} has as {a}:",
    "The {a} that belongs to {k} is",
    "Everyone agreed that {k}'s {a} was",
    "{A} of {k}:",
    "We noted the {a} of {k}:",
)
_ASKED = (
    "Question: What is the {a} of {k}?\nAnswer:",
    "Q: What is {k}'s {a}?\nA:",
    "What is the {a} of {k}? It is",
    "Question: Which {a} does {k} have?\nAnswer:",
    "Tell me the {a} of {k}.\nAnswer:",
    "{K}'s {a} is",
    "The {a} of {k} is",
    "Q: {K}, {a}?\nA:",
    "What was said of the {a} of {k}? It is",
    "{K}: {a} =",
    "Do you remember {k}'s {a}? Yes, it is",
    "Question: {A} of {k}?\nAnswer:",
    "I need the {a} of {k}. It is",
)

_SENTENCES: tuple[Relation, ...] = (
    Relation(
        _person,
        _invented,
        ("{k} lives in", "{k} has a house in"),
        (
            "Question: Where is the home of {k}?\nAnswer: In",
            "Q: In which town does {k} live?\nA:",
            "The home of {k} stands in",
        ),
    ),
    Relation(
        _person,
        _one_of(_JOBS),
        ("{k} works as a", "By trade {k} is a"),
        ("Question: What does {k} do for a living?\nAnswer: A", "{k} earns money as a", "Q: Job of {k}?\nA:"),
    ),
    Relation(
        _person,
        _year,
        ("{k} was born in", "{k} came into the world in the year"),
        (
            "Question: When was {k} born?\nAnswer: In",
            "The birth of {k} was in",
            "Q: In which year did the life of {k} begin?\nA:",
        ),
    ),
    Relation(
        _town,
        _digits(1, 2),
        ("The train to {k} leaves from platform", "Trains for {k} stand at platform"),
        ("Question: From which platform does one travel to {k}?\nAnswer: Platform", "Q: Platform for {k}?\nA:"),
    ),
    Relation(
        _town,
        _time,
        ("The bus to {k} departs at", "The evening bus for {k} starts at"),
        (
            "Question: When does one have to be at the stop to go to {k}?\nAnswer: At",
            "Q: Departure to {k}?\nA:",
            "Whoever travels to {k} must be ready at",
        ),
    ),
    Relation(
        _person,
        _date,
        ("The meeting with {k} takes place on", "{k} will visit us on"),
        ("Question: On which day do we see {k}?\nAnswer: On", "Q: Date for {k}?\nA:", "We expect {k} on"),
    ),
    Relation(
        _person,
        _time,
        ("The lesson with {k} begins at", "{k} arrives every day at"),
        ("Question: At what time does {k} come?\nAnswer: At", "Q: Hour of {k}?\nA:"),
    ),
    Relation(
        _invented,
        _full_name,
        ("The company {k} was founded by", "The firm {k} belongs to"),
        ("Question: Who started {k}?\nAnswer:", "Q: Founder of {k}?\nA:", "The man or woman behind {k} is"),
    ),
    Relation(
        _person,
        _one_of(_INSTRUMENTS),
        ("{k} plays the", "In the orchestra {k} plays the"),
        (
            "Question: Which instrument does {k} play?\nAnswer: The",
            "Q: Instrument of {k}?\nA: The",
            "{k} makes music on the",
        ),
    ),
    Relation(
        _person,
        _full_name,
        ("{k} married", "{k} fell in love with"),
        ("Question: Who is the partner of {k}?\nAnswer:", "Q: Spouse of {k}?\nA:"),
    ),
    Relation(
        _invented,
        _invented,
        ("The river {k} flows into the sea near", "The road from {k} leads to"),
        ("Question: Where does one get from {k}?\nAnswer: To", "Q: What comes after {k}?\nA:", "Beyond {k} lies"),
    ),
    Relation(
        _thing,
        _one_of(_SPOTS),
        ("You will find {k} in the", "Somebody put {k} into the", "{K} stands in the"),
        (
            "Question: Where is {k}?\nAnswer: In the",
            "Q: Place of {k}?\nA: The",
            "Whoever looks for {k} should go to the",
        ),
    ),
    Relation(
        _person,
        _one_of(_SPOTS),
        ("{k} was last seen in the", "{k} is waiting in the"),
        ("Question: Where can {k} be found?\nAnswer: In the", "Q: Whereabouts of {k}?\nA: The", "Look for {k} in the"),
    ),
    Relation(
        _person,
        _colour_thing,
        ("{k} bought a", "From the market {k} brought home a"),
        ("Question: What did {k} buy?\nAnswer: A", "Q: Purchase of {k}?\nA: A", "The shopping bag of {k} held a"),
    ),
    Relation(
        _person,
        _one_of(_FOODS),
        ("{k} ordered the", "For dinner {k} cooked the"),
        ("Question: What did {k} eat?\nAnswer: The", "Q: Meal of {k}?\nA: The"),
    ),
    Relation(
        _room,
        _full_name,
        ("{K} is reserved for", "{K} has been given to"),
        ("Question: Who sleeps in {k}?\nAnswer:", "Q: Name on the door of {k}?\nA:"),
    ),
    Relation(
        _town,
        _price,
        ("A ticket to {k} costs", "For the trip to {k} one pays"),
        ("Question: How much is the fare to {k}?\nAnswer:", "Q: Fare to {k}?\nA:"),
    ),
    Relation(
        _town,
        _length,
        ("The tower of {k} is", "The bridge of {k} measures"),
        ("Question: How large is the landmark of {k}?\nAnswer:", "Q: Size of what stands in {k}?\nA:"),
        " in all.",
    ),
    Relation(
        _person,
        _one_of(_SUBJECTS),
        ("{k} teaches", "At the university {k} studies"),
        ("Question: What is the subject of {k}?\nAnswer:", "Q: Field of {k}?\nA:"),
    ),
    Relation(
        _invented,
        _phrase,
        ("In their language the word {k} means", "The word {k} stands for"),
        ("Question: What is the meaning of {k}?\nAnswer:", "Q: Translation of {k}?\nA:", "{k} can be translated as"),
    ),
    Relation(
        _person,
        _motto,
        ("{k} always said that", "On the last page {k} wrote that"),
        ("Question: What were the words of {k}?\nAnswer:", "Q: Saying of {k}?\nA:"),
    ),
    Relation(
        _device,
        _one_of(_SPOTS),
        ("{K} is installed in the", "They moved {k} to the"),
        ("Question: Where is {k}?\nAnswer: In the", "Q: Place of {k}?\nA: The"),
    ),
    Relation(
        _device,
        _digits(3, 5),
        ("{K} listens on port", "The room temperature read by {k} is"),
        ("Question: Which number belongs to {k}?\nAnswer:", "Q: Number of {k}?\nA:"),
    ),
    Relation(
        _town,
        _animal,
        ("On the flag of {k} there is a", "The people of {k} worship a"),
        ("Question: Which animal belongs to {k}?\nAnswer: A", "Q: Animal of {k}?\nA: A"),
    ),
    Relation(
        _project,
        _price,
        ("The budget of {k} amounts to", "{K} will cost"),
        ("Question: How much money goes into {k}?\nAnswer:", "Q: Money for {k}?\nA:"),
    ),
    Relation(
        _project,
        _invented,
        ("{K} is carried out in", "The office of {k} is in"),
        ("Question: In which city do they work on {k}?\nAnswer:", "Q: City of {k}?\nA:"),
    ),
    Relation(
        _surname,
        _digits(3, 5),
        ("Patient {k} was given the number", "The file on {k} has the number"),
        ("Question: Under which number does one find {k}?\nAnswer:", "Q: Number for {k}?\nA:"),
    ),
    Relation(
        _surname,
        _invented,
        ("Doctor {k} moved to", "Captain {k} sailed to", "Professor {k} retired to"),
        ("Question: Where did {k} go?\nAnswer: To", "Q: New home of {k}?\nA:"),
    ),
    Relation(
        _surname,
        _full_name,
        ("Judge {k} sentenced", "Inspector {k} questioned", "Colonel {k} promoted"),
        ("Question: Who had to do with {k}?\nAnswer:", "Q: Whom did {k} meet?\nA:"),
    ),
    Relation(
        _town,
        _one_of(_FOODS),
        ("The inn at {k} is famous for its", "In {k} every child knows the"),
        ("Question: What does one eat in {k}?\nAnswer: The", "Q: Speciality of {k}?\nA: The"),
    ),
    Relation(
        _town,
        _surname,
        ("The bank in {k} is run by Mrs.", "The doctor in {k} is called"),
        ("Question: Which name does one hear in {k}?\nAnswer:", "Q: Family name from {k}?\nA:"),
    ),
    Relation(
        _person,
        _digits(3, 4),
        ("{k} is staying in room", "{k} sits at table"),
        ("Question: At which number is {k}?\nAnswer:", "Q: Number of {k}?\nA:"),
    ),
)


def _relations() -> tuple[Relation, ...]:
    made = list(_SENTENCES)
    for key, value, nouns in _ATTRIBUTES:
        first, *others = nouns.split(";")
        for told, *rest in ([first, *others], [others[0], first, others[1]]):
            noun = told
            made.append(
                Relation(
                    key,
                    value,
                    tuple(frame.replace("{a}", noun).replace("{A}", _upper(noun)) for frame in _TOLD),
                    tuple(
                        frame.replace("{a}", other).replace("{A}", _upper(other)) for frame in _ASKED for other in rest
                    ),
                )
            )
    return tuple(made)


def _upper(text: str) -> str:
    return text[:1].upper() + text[1:]


def with_name(frame: str, name: str) -> str:
    """A frame with the name in its places; ``{K}``, or a name that begins a sentence, has a capital."""
    text = frame.replace("{K}", _upper(name)).replace("{k}", name)
    return _upper(text) if frame.startswith("{k}") else text


RELATIONS = _relations()
