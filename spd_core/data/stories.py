"""Short English stories for children, from a seeded grammar: a corpus that needs no download.

What a sentence says depends on sentences before it: a name decides the pronouns, one or two heroes
decide the verbs, the tense is the story's, what was lost is found where it was lost, and of three
apples two are left.
"""

import random
import re
from collections.abc import Iterator

GIRLS = "Mia Anna Lucy Ella Rosa Nora Lily Zoe Ivy Clara Maya Ruby Emma Hana Leila Greta Sofia Amy"
BOYS = "Tom Ben Max Leo Sam Finn Omar Jack Hugo Paul Theo Luca Noah Ravi Adam Oscar Peter Dan"
NUMBERS = ["no", "one", "two", "three", "four", "five", "six"]
CHOICES = """
trait: kind brave quiet clever curious funny gentle cheerful shy busy
friend: friend cousin neighbor classmate
color: red blue green yellow orange purple white black golden silver
thing: kite ball boat hat drum doll lamp book bell cup spoon basket umbrella toy train ring flute
many: shoes marbles crayons mittens boots cards blocks gloves seeds shells
animal: fox duck rabbit squirrel goat turtle hedgehog bird cat dog owl frog hen pony lamb
size: small old young tiny hungry fluffy lonely thin
place: park beach forest market farm garden river school meadow castle library zoo hill lake
home: sea woods bakery mill bridge station church pond mountain road
landmark: bench fountain arch oak well tent barn fence windmill statue swing tower
spot: behind_the_stone_wall under_the_wooden_bridge beside_the_tall_tree \
in_the_long_grass next_to_the_empty_barrel under_a_pile_of_leaves behind_the_apple_cart \
between_two_rocks inside_a_hollow_log on_top_of_the_shed near_the_rose_bush
time: morning afternoon evening Sunday summer_day winter_day day_after_school
weather: sunny rainy windy cloudy cold warm foggy
sad: sad worried upset unhappy afraid
happy: happy proud glad cheerful thankful
food: apple cookie carrot pear nut bun plum berry cake
tool: tape string glue wire ribbon paint
"""
PRONOUNS = "he him I my his/she her I my her/it it I my its/they them we our their"
PAST = """have had go went see saw find found run ran say said tell told give gave take took
hold held sit sat feel felt fall fell eat ate can could hear heard think thought come came put put
sing sang shine shone leave left hug hugged bring brought meet met sleep slept break broke do did
hide hid nod nodded lose lost begin began know knew forget forgot"""

# Roles: h hero (one child or two), f friend, a animal, o object, l what is left; s and p: any other
# singular and plural subject. {h.walk} agrees with its subject; with ! (speech) in the present.
# "-" begins a part, "|" an alternative. Sections: opening, details, ending, then one for each plot.
TEMPLATES = """
- there {h.be} {h.kind} named {h}.
| {h.kind} named {h} {h.live} near the {home}.
| in a little house by the {home} {h.live} {h.kind} named {h}.
- {h} {h.have} {o.a} and {h.take} {o.him} everywhere.
| {h.his} {f.who} {f} {f.give} {h.him} {o.a} for {h.his} birthday.
| one {time}, {h} {h.find} {o.a} in an old box.
| of all things at home, {h.he} {h.love} {o.a} the most.
- one {time}, {h} {h.go} to the {place} with the {o}.
| on a {weather} {time}, {h.he} {h.walk} to the {place} to play with the {o}.
| {h.he} and {h.his} {f.who} {f} {p.visit} the {place}, and {h} {h.bring} the {o}.

- the birds {p.sing}, and the sun {s.shine} on the {landmark}.
| {f} {f.be} {trait}, and {f.he} {f.like} to tell stories about the {home}.
| {h} {h.eat} one {food}, and {f} {f.eat} {n}.
| the people at the {place} {p.know} {h}, and they {p.wave} at {h.him}.
| the {landmark} {s.be} {color}, like the {o}.

- now {h} {h.be} not {sad} any more. {h.he} {h.be} {happy}.
| {h} {h.hug} {f}, and {f} {f.be} {happy}. "thank you, {h}," {f.he} {f.say}.
| "you are a good {f.who}, {f}," {h.say} {h}, and {h.he} {h.feel} {happy}.
- all the way home from the {place}, {h} and {f} {p.talk} about the {o}.
| {h} never {h.forget} that day at the {place}, and {f} never {f.forget} the {o}.
| that night {h} {h.sleep} well and {h.see} the {o} and the {place} in a dream.

- a strong wind {s.come} and {s.carry} the {o} away. {o.he} {o.land} {spot}.
| {a.a} {a.take} the {o} in the {place}, {a.run} away, and {a.hide} {o.him} {spot}.
| {h.he} {h.sit} down {spot} to rest, and when {h.he} {h.go} home, {h.he} {h.leave} the {o} there.
- {h} {h.can} not see the {o} any more and {h.feel} very {sad}.
| "{h.i} can not find {h.my} {o}!" {h.cry} {h}. {h.he} {h.be} {sad}.
| soon {h.he} {h.be} {sad} and {h.ask}, "where {o.be!} {h.my} {o}?"
- {h} {h.look} behind the {landmark}, but the {o} {o.be} not there.
| first {h.he} {h.search} near the {landmark}, but there {p.be} only dry leaves.
- "do not be {sad}," {f.say} {f}. "I will help you find the {o}."
| {f} {f.see} that {h} {h.be} {sad}. "{o.be!} the {o} gone?" {f.he} {f.ask}.
- at last they {p.look} {spot}, and there {o.be} the {o}!
| then {f} {f.go} back and {f.find} the {o} {spot}.
| "I know where {o.he} {o.be!}!" {f.say} {f}. the {o} {o.be} {spot}.

- {h.he} also {h.have} a bag with {n} {foods} for lunch.
- near the {landmark} {h.he} {h.meet} {a.a}. the {a} {a.be} hungry and {a.want} to eat.
| {spot} {h.he} {h.see} {a.a}. the {a} {a.look} at the {foods} for a long time.
- "{a.be!} the {a} hungry?" {h.ask} {h}. {f} {f.nod}.
| {f} {f.say}, "the {a} {a.have!} no food. look how thin {a.he} {a.be!}!"
- {h} {h.give} one {food} to the {a}, so {h.he} {h.have} {m} {l} now.
- later the {o} {o.fall} into the water, and {h} {h.be} {sad}.
- but the {a} {a.go} and {a.bring} the {o} back to {h}!
| the {a} {a.find} the {o} and {a.give} {o.him} back. "{a.he} {a.be!} our friend now," {f.say} {f}.

- {h} {h.run} too fast and {h.fall}, and the {o} {o.break}.
- "oh no! {h.my} {o} {o.be!} broken!" {h.cry} {h}. {h.he} {h.be} {sad}.
- {h.he} {h.want} to mend the {o} with {tool}, but {h.he} {h.have} no {tool}.
- so {h} {h.go} to {f}, who {f.be} at the {landmark}. "do you have {tool}?" {h.he} {h.ask}.
| {f} {f.hear} about it and {f.come} at once. "I have {tool}!" {f.he} {f.say}.
- {f} and {h} {p.sit} down and {p.mend} the {o} with {tool}.
| first {f} {f.hold} the {o}, and {h} {h.use} the {tool}. then {o.he} {o.be} as good as new.

- the next day {h} {h.hear} that {f} {f.be} ill, and {h.he} {h.feel} {sad}.
- "what can {h.i} do for {f}?" {h.ask} {h}.
- {h.he} {h.look} for flowers {spot}, but there {p.be} none.
| first {h.he} {h.pick} {n} flowers {spot}, but {a.a} {a.eat} all {n}.
- then {h} {h.think} of the {o}. "{f} would love {o.him}!" {h.he} {h.say}.
- {f} {f.be} in bed when {h} {h.come} in with the {o}.

- when it {s.be} dark, {h} {h.hear} a strange sound {spot}. {h.he} {h.be} {sad}.
- "{s.do!} it come from {spot}?" {h.ask} {h}. "{h.i} want to go home!"
| {h} {h.call} {f}, who {f.be} at the {landmark}. "something {s.be!} there!" {h.he} {h.say}.
- {f} {f.be} not {sad} at all. {f.he} {f.take} a lamp and {f.walk} on slowly.
- they {p.look} {spot}, and there {a.be} {a.a}! the {a} only {a.want} to see the {o}.
| then {a.a} {a.come} to them and {a.sit} down beside the {o}.
- "the {a} {a.be!} not dangerous," {f.say} {f}, and {h} {h.show} the {a} the {o}.
"""
SECTIONS = [
    [alternatives.split("\n| ") for alternatives in section.strip("-\n ").split("\n- ")]
    for section in TEMPLATES.split("\n\n")
]
IRREGULAR: dict[str, str] = dict(zip(PAST.split()[::2], PAST.split()[1::2], strict=True))
Role = tuple[dict[str, str], bool]  # its forms by name, and whether its verbs are plural


def stories(n: int, seed: int) -> Iterator[str]:
    """Story i depends on (seed, i) alone."""
    return (_story(random.Random(f"{seed}:{i}")) for i in range(n))


def _story(rng: random.Random) -> str:
    choices = (line.split(": ") for line in CHOICES.strip().splitlines())
    word: dict[str, str] = {n: rng.choice(text.split()).replace("_", " ") for n, text in choices}
    n = rng.randrange(2, 7)
    word |= {"foods": _add_s(word["food"]), "n": NUMBERS[n], "m": NUMBERS[n - 1]}
    roles, past = _roles(rng, word, n - 1), rng.random() < 0.7
    opening, (details,), ending, *plots = SECTIONS
    # Details come before anything goes wrong: there they contradict nothing.
    told = [rng.choice(lines) for lines in opening] + rng.sample(details, rng.randrange(3))
    told += [rng.choice(lines) for lines in rng.choice(plots) + ending]
    return " ".join(_sentence(template, roles, word, past) for template in told)


def _roles(rng: random.Random, word: dict[str, str], n_left: int) -> dict[str, Role]:
    one, two, friend = rng.sample([*GIRLS.split(), *BOYS.split()], 3)
    he, friend_he = ("she" if name in GIRLS.split() else "he" for name in (one, friend))
    pair, many, several = rng.random() < 0.25, rng.random() < 0.3, rng.random() < 0.3
    child = _article(f"{word['trait']} {'girl' if he == 'she' else 'boy'}")
    hero, kind = (f"{one} and {two}", f"two {word['trait']} children") if pair else (one, child)
    thing = f"{word['color']} {word['many' if many else 'thing']}"
    animal, one_animal = word["animal"], _article(f"{word['size']} {word['animal']}")
    if several:
        animal, one_animal = _add_s(animal), _add_s(f"two {word['size']} {animal}")
    return {
        "h": _role(hero, "they" if pair else he, kind=kind),
        "f": _role(friend, friend_he, who=word["friend"]),
        "o": _role(thing, "they" if many else "it", a=f"some {thing}" if many else _article(thing)),
        "a": _role(animal, "they" if several else "it", a=one_animal),
        "l": _role(word["food" if n_left == 1 else "foods"], "it" if n_left == 1 else "they"),
        "s": ({}, False),
        "p": ({}, True),
    }


def _role(name: str, he: str, **forms: str) -> Role:
    row = next(row.split() for row in PRONOUNS.split("/") if row.startswith(f"{he} "))
    pronouns = dict(zip(("he", "him", "i", "my", "his"), row, strict=True))
    return {"name": name, **pronouns, **forms}, he == "they"


def _sentence(template: str, roles: dict[str, Role], word: dict[str, str], past: bool) -> str:
    def fill(match: re.Match[str]) -> str:
        name, form, speech = match.groups()
        if name in word:
            return word[name]
        forms, plural = roles[name]
        form = form or "name"
        return forms[form] if form in forms else _verb(form, plural, past and not speech)

    text = re.sub(r"\{(\w+)(?:\.(\w+)(!?))?\}", fill, template)
    starts = r'^"?[a-z]|(?<=[.!?] )"?[a-z]|(?<=, ")[a-z]'
    return re.sub(starts, lambda match: match.group().upper(), text)


def _verb(verb: str, plural: bool, past: bool) -> str:
    if verb == "be":
        return (("is", "was"), ("are", "were"))[plural][past]
    if past:
        regular = re.sub("(?<![aeo])y$", "i", verb.removesuffix("e")) + "ed"
        return IRREGULAR.get(verb, regular)
    return verb if plural or verb == "can" else {"have": "has"}.get(verb, _add_s(verb))


def _add_s(word: str) -> str:
    """The plural of a noun, or a verb after he, she and it."""
    ending = "es" if word.endswith(("x", "ch", "o")) else "s"
    return re.sub("(?<![aeo])y$", "ie", word) + ending


def _article(phrase: str) -> str:
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"
