"""Rules that verify instructions, after IFEval (Zhou et al., 2023, arXiv:2311.07911).

One function per instruction type: ``rule(response, **arguments)``. Types, arguments and criteria are IFEval's. Three
parts for which the original uses libraries with downloaded models are rules here, too, so that scores may differ from
published ones by a few instructions: sentence splitting (`sentences`), language detection
(`fdl.evaluators.languages`), and capitalised words (`_CAPITALS`). If a prompt requires a sign such as ``#`` a number of
times, that sign is counted, where the original counts a random letter.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

from fdl.errors import UserError
from fdl.evaluators.languages import KNOWN, detect

Rule = Callable[..., bool]

RULES: dict[str, Rule] = {}
"""All rules by the id of the instruction type, e.g. ``"punctuation:no_comma"``."""

_WORD = re.compile(r"\w+")
_CAPITALS = re.compile(r"\w+(?:[-.]\w+)*")
"""Words for counting capitals: ``well-known`` and ``U.S`` are one word each, ``I'm`` is two."""

_SENTENCE_END = re.compile(r"[.!?…。！？।]+[\"'”’)\]*_]*(?=\s|$)|[。！？]")
"""End marks, then any closing quotes, brackets or emphasis, then white space: ``3.14`` and ``U.S.A`` do not match."""

_ABBREVIATION = re.compile(r"(?:^|[\s(\"'])(?:(?i:mr|mrs|ms|dr|prof|st|sr|jr|vs|approx|e\.g|i\.e|p\.s)|[A-HJ-Z])\.$")
"""Abbreviations and initials whose full stop does not end a sentence, except at the end of the text."""

_ANSWERS = ("My answer is yes.", "My answer is no.", "My answer is maybe.")


def sentences(text: str) -> list[str]:
    """Split a text into sentences at end marks followed by white space, except after abbreviations.

    A remainder without end mark is a sentence, too, if it has a letter or digit. A line break alone ends no sentence.

    Args:
        text: the text to split.

    Example:
        >>> sentences("See e.g. Dr. Who. It ends! Does it")
        ['See e.g. Dr. Who.', 'It ends!', 'Does it']
    """
    found, start = [], 0
    for end in _SENTENCE_END.finditer(text):
        piece = text[start : end.end()]
        if _ABBREVIATION.search(piece) and text[end.end() :].strip():
            continue
        found.append(piece)
        start = end.end()
    found.append(text[start:])
    return [piece.strip() for piece in found if _WORD.search(piece)]


def variants(response: str) -> list[str]:
    """List the variants that loose accuracy accepts: without first line, last line or both, with and without asterisks.

    Args:
        response: the model's response.
    """
    lines = response.split("\n")
    cut = [response, *("\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1]))]
    return [*cut, *(text.replace("*", "") for text in cut)]


def is_followed(instruction: str, arguments: dict[str, Any], response: str, loose: bool = False) -> bool:
    """Return True if a response follows an instruction; an empty response follows none.

    Args:
        instruction: id of the instruction type, a key of `RULES`.
        arguments: the rule's arguments.
        response: the model's response.
        loose: accept the response if one of its `variants` follows the instruction.
    """
    tried = variants(response) if loose else [response]
    return any(bool(text.strip()) and RULES[instruction](text, **arguments) for text in tried)


def _rule(instruction: str) -> Callable[[Rule], Rule]:
    def register(rule: Rule) -> Rule:
        RULES[instruction] = rule
        return rule

    return register


def _compare(number: int, relation: str, bound: int) -> bool:
    if relation not in ("at least", "less than"):
        raise UserError(f"relation must be 'at least' or 'less than', got {relation!r}")
    return number >= bound if relation == "at least" else number < bound


# --- keywords: anywhere in the text, in any case; forbidden ones as whole words


@_rule("keywords:existence")
def _existence(response: str, keywords: list[str]) -> bool:
    return all(keyword.lower() in response.lower() for keyword in keywords)


@_rule("keywords:frequency")
def _frequency(response: str, keyword: str, frequency: int, relation: str) -> bool:
    return _compare(response.lower().count(keyword.lower()), relation, frequency)


@_rule("keywords:forbidden_words")
def _forbidden_words(response: str, forbidden_words: list[str]) -> bool:
    return not any(re.search(rf"\b{re.escape(word)}\b", response, re.IGNORECASE) for word in forbidden_words)


@_rule("keywords:letter_frequency")
def _letter_frequency(response: str, letter: str, let_frequency: int, let_relation: str) -> bool:
    return _compare(response.lower().count(letter.lower()), let_relation, let_frequency)


# --- language and case


@_rule("language:response_language")
def _response_language(response: str, language: str) -> bool:
    if language not in KNOWN:
        raise UserError(f"language must be one of {', '.join(sorted(KNOWN))}, got {language!r}")
    return detect(response) == language


@_rule("change_case:english_capital")
def _english_capital(response: str) -> bool:
    return response.isupper() and detect(response) == "en"


@_rule("change_case:english_lowercase")
def _english_lowercase(response: str) -> bool:
    return response.islower() and detect(response) == "en"


@_rule("change_case:capital_word_frequency")
def _capital_word_frequency(response: str, capital_frequency: int, capital_relation: str) -> bool:
    capitals = sum(word.isupper() for word in _CAPITALS.findall(response))
    return _compare(capitals, capital_relation, capital_frequency)


# --- length


@_rule("length_constraints:number_words")
def _number_words(response: str, num_words: int, relation: str) -> bool:
    return _compare(len(_WORD.findall(response)), relation, num_words)


@_rule("length_constraints:number_sentences")
def _number_sentences(response: str, num_sentences: int, relation: str) -> bool:
    return _compare(len(sentences(response)), relation, num_sentences)


@_rule("length_constraints:number_paragraphs")
def _number_paragraphs(response: str, num_paragraphs: int) -> bool:
    """Paragraphs with three asterisks between them, and none of them empty but for the outermost."""
    return _filled(re.split(r"\s?\*\*\*\s?", response)) == num_paragraphs


@_rule("length_constraints:nth_paragraph_first_word")
def _nth_paragraph_first_word(response: str, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    """Paragraphs with two line breaks between them, so many of them, and the n-th begins with the word."""
    paragraphs = [paragraph.strip() for paragraph in response.split("\n\n") if paragraph.strip()]
    if len(paragraphs) != num_paragraphs or not 1 <= nth_paragraph <= num_paragraphs:
        return False
    word = paragraphs[nth_paragraph - 1].split()[0].lstrip("'\"")
    return re.split(r"[.,?!'\"]", word)[0].lower() == first_word.lower()


# --- content


@_rule("detectable_content:number_placeholders")
def _number_placeholders(response: str, num_placeholders: int) -> bool:
    return len(re.findall(r"\[.*?\]", response)) >= num_placeholders


@_rule("detectable_content:postscript")
def _postscript(response: str, postscript_marker: str) -> bool:
    """Find the marker in any case, with or without spaces after its full stops."""
    letters = [re.escape(letter) for letter in postscript_marker if letter.isalpha()]
    final = r"\." if postscript_marker.endswith(".") else ""
    return re.search(r"\.\s?".join(letters) + final, response, re.IGNORECASE) is not None


# --- format


@_rule("detectable_format:number_bullet_lists")
def _number_bullet_lists(response: str, num_bullets: int) -> bool:
    """Count lines that begin with a single asterisk or a hyphen; the number must be exact."""
    return len(re.findall(r"^\s*(?:\*[^*\n]|-)", response, re.MULTILINE)) == num_bullets


@_rule("detectable_format:constrained_response")
def _constrained_response(response: str) -> bool:
    return any(answer in response for answer in _ANSWERS)


@_rule("detectable_format:number_highlighted_sections")
def _number_highlighted_sections(response: str, num_highlights: int) -> bool:
    """Count passages within a line between single or double asterisks."""
    double = re.findall(r"\*\*([^\n*]*)\*\*", response)
    single = re.findall(r"\*([^\n*]*)\*", response)
    return sum(bool(text.strip()) for text in (*double, *single)) >= num_highlights


@_rule("detectable_format:multiple_sections")
def _multiple_sections(response: str, section_spliter: str, num_sections: int) -> bool:
    """Count sections that begin with the given word and a number."""
    return len(re.findall(rf"{re.escape(section_spliter)}\s?\d+", response)) >= num_sections


@_rule("detectable_format:json_format")
def _json_format(response: str) -> bool:
    """Parse the whole text as JSON, with or without a Markdown fence around it."""
    text = response.strip()
    fenced = re.fullmatch(r"```(?:json)?(.*?)(?:```)?", text, re.DOTALL | re.IGNORECASE)
    try:
        json.loads(fenced[1] if fenced else text)
    except (ValueError, RecursionError):
        return False
    return True


@_rule("detectable_format:title")
def _title(response: str) -> bool:
    return any(title.strip("<> ") for title in re.findall(r"<<[^\n]+>>", response))


# --- combinations


@_rule("combination:two_responses")
def _two_responses(response: str) -> bool:
    """Require two different responses separated by six asterisks."""
    parts = response.split("******")
    answers = {part.strip() for part in parts if part.strip()}
    return _filled(parts) == 2 and len(answers) == 2


@_rule("combination:repeat_prompt")
def _repeat_prompt(response: str, prompt_to_repeat: str) -> bool:
    return response.strip().lower().startswith(prompt_to_repeat.strip().lower())


# --- start, end and punctuation


@_rule("startend:end_checker")
def _end_checker(response: str, end_phrase: str) -> bool:
    return response.strip().strip('"').lower().endswith(end_phrase.strip().lower())


@_rule("startend:quotation")
def _quotation(response: str) -> bool:
    text = response.strip()
    return len(text) > 1 and text[0] == text[-1] == '"'


@_rule("punctuation:no_comma")
def _no_comma(response: str) -> bool:
    return "," not in response


def _filled(parts: list[str]) -> int | None:
    """Count the parts that have text; None if a part between two others is empty."""
    return None if any(not part.strip() for part in parts[1:-1]) else sum(bool(part.strip()) for part in parts)
