"""Every rule with answers that follow it and answers that do not, written by hand."""

import pytest

from fdl.errors import UserError
from fdl.evaluators.instructions import RULES, is_followed, sentences, variants

CASES = [
    ("keywords:existence", {"keywords": ["Dog", "day"]}, ["Every DOG has its Day.", "dogs today"], ["A dog.", "day"]),
    (
        "keywords:frequency",
        {"keyword": "war", "frequency": 2, "relation": "at least"},
        ["War and war.", "wartime war"],
        ["War and peace."],
    ),
    (
        "keywords:frequency",
        {"keyword": "war", "frequency": 2, "relation": "less than"},
        ["War and peace.", "peace"],
        ["war war"],
    ),
    ("keywords:forbidden_words", {"forbidden_words": ["die", "key"]}, ["Dieters love keys."], ["They Die.", "a key"]),
    (
        "keywords:letter_frequency",
        {"letter": "e", "let_frequency": 3, "let_relation": "at least"},
        ["Eleven e"],
        ["seen it"],
    ),
    (
        "keywords:letter_frequency",
        {"letter": "!", "let_frequency": 2, "let_relation": "less than"},
        ["Well!"],
        ["Well!!"],
    ),
    (
        "language:response_language",
        {"language": "de"},
        ["Das ist ein kurzer Satz, und er ist nicht auf Englisch."],
        ["This is a short sentence, and it is not German.", "42"],
    ),
    ("change_case:english_capital", {}, ["THIS IS IT."], ["This IS IT.", "DAS IST NICHT DER SATZ.", "123"]),
    ("change_case:english_lowercase", {}, ["this is it."], ["This is it.", "das ist nicht der satz.", "123"]),
    (
        "change_case:capital_word_frequency",
        {"capital_frequency": 2, "capital_relation": "at least"},
        ["NASA and ESA fly.", "I'm WELL-KNOWN"],
        ["NASA and Esa fly."],
    ),
    (
        "change_case:capital_word_frequency",
        {"capital_frequency": 2, "capital_relation": "less than"},
        ["NASA flies."],
        ["NASA and ESA fly."],
    ),
    ("length_constraints:number_words", {"num_words": 3, "relation": "at least"}, ["One two three."], ["One two - !"]),
    ("length_constraints:number_words", {"num_words": 3, "relation": "less than"}, ["One two."], ["One two three."]),
    ("length_constraints:number_sentences", {"num_sentences": 2, "relation": "at least"}, ["One. Two!"], ["One, two."]),
    ("length_constraints:number_sentences", {"num_sentences": 2, "relation": "less than"}, ["One"], ["One? Two"]),
    (
        "length_constraints:number_paragraphs",
        {"num_paragraphs": 2},
        ["One.\n***\nTwo.", "***\nOne.\n***\nTwo.\n***"],
        ["One.\n\nTwo.", "One.\n***\n***\nTwo.", "1 *** 2 *** 3"],
    ),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "weekend"},
        ['First.\n\n"Weekend\'s" over.', "First.\n\n\n\nweekend, at last"],
        ["First.\n\nThe weekend.", "Weekend\n\nother", "a\n\nweekend\n\nb", "weekend"],
    ),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, ["[name] of [city]"], ["[name] of (city)"]),
    (
        "detectable_content:postscript",
        {"postscript_marker": "P.S."},
        ["Bye.\nP.S. Call me.", "bye p. s. call"],
        ["Bye. PS: call me.", "P.S call"],
    ),
    (
        "detectable_content:postscript",
        {"postscript_marker": "P.P.S"},
        ["Bye.\nP.P.S Call me.", "p.p.s. call"],
        ["Bye.\nP.S. Call me."],
    ),
    (
        "detectable_format:number_bullet_lists",
        {"num_bullets": 2},
        ["Two:\n* one\n* two", "- one\n  - two"],
        ["* one", "* one\n* two\n- three", "**bold**\n* one"],
    ),
    (
        "detectable_format:constrained_response",
        {},
        ["Well. My answer is maybe."],
        ["Maybe.", "my answer is yes", "My answer is no"],
    ),
    (
        "detectable_format:number_highlighted_sections",
        {"num_highlights": 2},
        ["*one* and *two*", "**one** and *two*"],
        ["*one*", "**one** and * *", "*one\ntwo* three"],
    ),
    (
        "detectable_format:multiple_sections",
        {"section_spliter": "SECTION", "num_sections": 2},
        ["SECTION 1\na\nSECTION 2\nb", "SECTION1 SECTION 2"],
        ["SECTION 1\na", "Section 1\nSection 2", "SECTION one\nSECTION two"],
    ),
    (
        "detectable_format:json_format",
        {},
        ['{"a": [1, 2]}', '```json\n{"a": 1}\n```', '```\n{"a": 1}\n```'],
        ["{a: 1}", 'Here: {"a": 1}', "```json\nno\n```"],
    ),
    ("detectable_format:title", {}, ["<<My title>>\ntext"], ["<My title>", "<<>>", "<< >>", "<<a\nb>>"]),
    ("combination:two_responses", {}, ["One\n******\nTwo"], ["One", "One\n******\none more ****** Two", "A******A"]),
    (
        "combination:repeat_prompt",
        {"prompt_to_repeat": "Write a poem."},
        [" write a poem. Roses are red."],
        ["Roses are red. Write a poem."],
    ),
    ("startend:end_checker", {"end_phrase": "Peace!"}, ['"Bye. peace!" '], ["Peace! Bye."]),
    ("startend:quotation", {}, ['"All of it."\n'], ['"Some" of it.', '"', "'All of it.'"]),
    ("punctuation:no_comma", {}, ["One two; three"], ["One, two"]),
]


@pytest.mark.parametrize("instruction, arguments, right, wrong", CASES, ids=[case[0] for case in CASES])
def test_rule(instruction, arguments, right, wrong):
    assert [is_followed(instruction, arguments, answer) for answer in right] == [True] * len(right)
    assert [is_followed(instruction, arguments, answer) for answer in wrong] == [False] * len(wrong)


def test_every_rule_is_among_the_cases():
    assert {case[0] for case in CASES} == set(RULES)
    assert len(RULES) == 25


def test_an_empty_answer_follows_nothing():
    for instruction, arguments, *_ in CASES:
        assert not is_followed(instruction, arguments, " \n", loose=True)


def test_loose_reading_also_looks_without_asterisks_and_without_the_outer_lines():
    assert variants("a\n*b*\nc") == ["a\n*b*\nc", "*b*\nc", "a\n*b*", "*b*", "a\nb\nc", "b\nc", "a\nb", "b"]
    quoted = 'Sure, here it is:\n"*Well*"\nIs that, as you wished, right?'
    assert not is_followed("startend:quotation", {}, quoted)
    assert is_followed("startend:quotation", {}, quoted, loose=True)
    assert is_followed("punctuation:no_comma", {}, quoted, loose=True)
    assert not is_followed("keywords:existence", {"keywords": ["missing"]}, quoted, loose=True)
    bold = "**Peace!**"
    assert not is_followed("startend:end_checker", {"end_phrase": "Peace!"}, bold)
    assert is_followed("startend:end_checker", {"end_phrase": "Peace!"}, bold, loose=True)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("One. Two! Three? Four", 4),
        ("It costs 3.14 dollars. Really?!", 2),
        ("Dr. Smith met Mrs. J. Doe, i.e. nobody. They left.", 2),
        ("The answer is no. Why not?", 2),
        ("So do I. And you?", 2),
        ('"Stop!" he said. (He meant it.) **Done.** Well…', 5),
        ("See www.example.com for more.", 1),
        ("A heading\n\nA sentence.", 1),
        ("你好。再见！", 2),
        ("यह एक वाक्य है। यह दूसरा है।", 2),
        ("- ***\n...", 0),
        ("", 0),
    ],
)
def test_sentences(text, expected):
    assert len(sentences(text)) == expected


def test_wrong_arguments_are_named():
    with pytest.raises(UserError, match="relation must be 'at least' or 'less than', got 'exactly'"):
        is_followed("length_constraints:number_words", {"num_words": 1, "relation": "exactly"}, "one")
    with pytest.raises(UserError, match=r"language must be one of .*, got 'xx'"):
        is_followed("language:response_language", {"language": "xx"}, "one")
