import random
import re

import pytest

from spd_core.data.stories import stories

GIRL_NAMES = """Mia Anna Lucy Ella Rosa Nora Lily Zoe Ivy Clara Maya Ruby Emma Hana Leila Greta
Sofia Amy"""
BOY_NAMES = """Tom Ben Max Leo Sam Finn Omar Jack Hugo Paul Theo Luca Noah Ravi Adam Oscar Peter
Dan"""
GIRLS, BOYS = set(GIRL_NAMES.split()), set(BOY_NAMES.split())
COLORS = "red|blue|green|yellow|orange|purple|white|black|golden|silver"
COUNTS = ["zero", "one", "two", "three", "four", "five", "six"]


@pytest.fixture(scope="module")
def corpus() -> list[str]:
    return list(stories(2000, seed=1))


def narration(story: str) -> str:
    return re.sub(r'"[^"]*"', "", story)


def test_a_story_depends_on_seed_and_index_alone(corpus):
    random.seed(5)
    assert list(stories(20, seed=1)) == corpus[:20]
    assert not set(stories(20, seed=2)) & set(corpus)


def test_stories_are_short_and_differ(corpus):
    assert all(80 <= len(story.split()) <= 200 for story in corpus)
    assert len(set(corpus)) == len(corpus)
    sentences = {s for story in corpus for s in re.split(r"(?<=[.!?]) ", story)}
    assert len(sentences) > 10_000


def test_everything_is_filled_in_and_begins_with_a_capital(corpus):
    for story in corpus:
        assert not re.search(r"[{}_|]|  |^-| [,.!?]|\bNone\b", story)
        assert story.count('"') % 2 == 0
        assert all(s.lstrip('"')[0].isupper() for s in re.split(r"(?<=[.!?]) ", story))


def test_subjects_agree_with_their_verbs(corpus):
    plural = "(are|were|have|want|go|look|come|say|sit|find)"
    singular = r"(is|was|has|wants|goes|looks|comes|says|sits|finds)"
    for story in corpus:
        assert not re.search(rf"\b([Hh]e|[Ss]he|[Ii]t) {plural}\b", story.replace("Does it", ""))
        assert not re.search(rf"\b([Tt]hey|[Ww]e|[Yy]ou|I) {singular}\b(?! and)", story)
        assert not re.search(r"\b(an [^aeiou]|a [aeiou])", story)
        assert not re.search(r"\b(one|a \w+) (apples|cookies|carrots|berries|cakes)\b", story)


def test_a_story_keeps_its_tense(corpus):
    past = "was|were|had|went|said|felt|found"
    present = "is|are|has|have|goes|go|says|say|feels|feel|finds|find"
    kinds = [
        (bool(re.search(rf"\b({past})\b", t)), bool(re.search(rf"\b({present})\b", t)))
        for t in (re.sub(r"(not|to) \w+", "", narration(story)) for story in corpus)
    ]
    assert set(kinds) == {(True, False), (False, True)}


def test_the_name_decides_the_pronouns(corpus):
    boyish, girlish = re.compile(r"\b([Hh]e|him|[Hh]is)\b"), re.compile(r"\b([Ss]he|[Hh]ers?)\b")
    n_girls = n_boys = 0
    for story in corpus:
        words = set(re.findall(r"\w+", story))
        if not words & BOYS:
            n_girls += 1
            assert not boyish.search(story)
        if not words & GIRLS:
            n_boys += 1
            assert not girlish.search(story)
        kind = re.search(r"\b(girl|boy)\b(?: named ([A-Z]\w+))?", story)
        if kind and kind[2]:
            assert (kind[2] in GIRLS) == (kind[1] == "girl")
    assert n_girls > 200 and n_boys > 200


def test_the_object_of_the_beginning_comes_back_at_the_end(corpus):
    n_last = 0
    for story in corpus:
        first = re.search(rf"\b({COLORS}) (\w+)", story)
        assert first
        end = " ".join(story.split()[-60:])
        n_last += first[0] in end
    assert n_last == len(corpus)


def test_what_is_lost_is_found_where_it_was_lost(corpus):
    seen = 0
    for story in corpus:
        lost = re.search(r"away\. (?:It|They) lands? (.*?)\.", story)
        if lost:
            seen += 1
            assert lost[1] in story[lost.end() :]
    assert seen > 10


def test_what_was_given_away_is_missing(corpus):
    pattern = re.compile(r"a bag with (\w+) \w+ for lunch.*? so (?:he|she|they) ha\w+ (\w+) (\w+)")
    found = [match for story in corpus if (match := pattern.search(story))]
    assert len(found) > 100
    for match in found:
        assert COUNTS.index(match[2]) == COUNTS.index(match[1]) - 1
        assert match[3].endswith("s") == (match[2] != "one")
