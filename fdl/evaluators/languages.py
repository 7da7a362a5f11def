"""Language detection by script and most frequent words, without a model or a download.

A script used by a single language decides at once. Among languages that share a script, the one whose function words
are most frequent wins; a word of several languages counts fractionally for each, and accented letters that a language
does not use count against it. Meant for texts of at least one sentence.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter

_SCRIPTS = {
    "ARABIC": ("ar", "fa", "ur"),
    "BENGALI": ("bn",),
    "CJK": ("zh",),
    "CYRILLIC": ("ru", "bg", "uk"),
    "DEVANAGARI": ("hi", "mr", "ne"),
    "GREEK": ("el",),
    "GUJARATI": ("gu",),
    "GURMUKHI": ("pa",),
    "HANGUL": ("ko",),
    "HEBREW": ("he",),
    "HIRAGANA": ("ja",),
    "KANNADA": ("kn",),
    "KATAKANA": ("ja",),
    "LATIN": ("en", "de", "es", "fi", "fr", "it", "nl", "pt", "sw", "vi"),
    "MALAYALAM": ("ml",),
    "TAMIL": ("ta",),
    "TELUGU": ("te",),
    "THAI": ("th",),
}
"""Languages by the first word of their letters' Unicode names; the first one is the default without function words."""

_WORDS = {
    "ar": "في من على أن إلى التي هذا هذه عن مع ما لا كان أو ذلك هو هي الذي قد بين كل لم بعد",
    "bg": "и на да се за от е в са с не по които като до през тази това към при може или бъде със ще си",
    "de": "der die das und ist in den von zu mit ein eine nicht auf für im des dem sich als auch es an ich sie er wir "
    "sind wird einen bei oder aus wie nach haben",
    "en": "the of and to in a is that it for was on are as with be by this at from or an have not you which his her "
    "they we i my your will would has were but all can if their there he she do so",
    "es": "el la de que y en los las un una por con no se para su es al lo como más del pero sus está son este muy",
    "fa": "و در به از که این را با است برای آن یک می تا خود بود شود شده هم اما ها های بر نیز او باید",
    "fi": "ja on ei se että oli hän joka mutta ovat kun niin myös tai jos kuin olen sen minä ole mitä sekä hänen tämä "
    "voi he siitä hyvin",
    "fr": "le la les de des et un une est que dans pour qui sur pas au ce elle avec par plus ne se nous vous je du "
    "son sont ou cette",
    "hi": "है के में की से को का और हैं यह पर एक ने नहीं कि भी था वह जो हो लिए थे कर अपने",
    "it": "il di che è e la un una per non con del della i le gli si da sono nel alla più come ma anche dei lo questo "
    "in al ha mi",
    "mr": "आहे आणि व ते हे या च्या तर हा की आहेत ही नाही होते मी तो म्हणून केले असे पण त्यांच्या त्या एक मध्ये आपल्या होता",
    "ne": "छ र मा को छन् हो यो पनि लागि गर्न भएको भने एक तर गरेको हुन् थियो छैन मेरो यस त्यो हुन्छ गर्ने लाई",
    "nl": "de het een en van is in dat op te zijn met voor niet aan er ook als bij of door om naar maar ik je hij dit",
    "pt": "o a de que e do da em um uma para não com os as se por no na é mais dos como mas foi ao ele das seu sua são "
    "ou muito eu você",
    "ru": "и в не на что с как это по из у к за то все он она так его но от для мы вы же или я был есть быть при",
    "sw": "na ya wa kwa ni katika za la kuwa hii yake huo hiyo kama au sana lakini watu mimi wote pia ambayo yangu "
    "hata si cha vya wao",
    "uk": "і в не на що з як це по із у до за та він вона так його але від для ми ви же або я був є бути при й",
    "ur": "کے کی میں ہے اور سے کا یہ کو نے پر ہیں کہ ایک بھی تھا وہ اس نہیں جو کر لیے گیا ہو تھے",
    "vi": "và là của không có được cho một các với những trong này người khi đã để từ như tôi bạn về sẽ nhiều rất",
}

KNOWN = frozenset(language for languages in _SCRIPTS.values() for language in languages)
"""ISO 639-1 codes that `detect` can return."""

_ACCENTS = {
    "de": "äöüß",
    "es": "áéíñóúü",
    "fi": "äöå",
    "fr": "àâæçèéêëîïôùûüÿœ",
    "it": "àèéìòóù",
    "nl": "éëïóö",
    "pt": "áâãàçéêíóôõúü",
    "vi": "àáâãèéêìíòóôõùúýăđĩũơưạảấầẩẫậắằẳẵặẹẻẽếềểễệỉịọỏốồổỗộớờởỡợụủứừửữựỳỵỷỹ",
}
"""Letters beyond a–z of languages in Latin script; English and Swahili have none."""

_OWNERS = Counter(word for words in _WORDS.values() for word in set(words.split()))
_WEIGHTS = {language: {word: 1 / _OWNERS[word] for word in words.split()} for language, words in _WORDS.items()}


def detect(text: str) -> str | None:
    """Detect the language of a text.

    Args:
        text: running text.

    Returns:
        Its ISO 639-1 code; None without letters of a known script. Without any known function word, text in Latin
        letters counts as English, in Cyrillic as Russian, in Arabic letters as Arabic, in Devanagari as Hindi.

    Example:
        >>> detect("Der Hund ist nicht so groß wie die Katze"), detect("the dog is not as big as the cat")
        ('de', 'en')
    """
    # vowels that are marks on a letter, as in Devanagari, count as letters
    scripts = Counter(_script(letter) for letter in text if unicodedata.category(letter)[0] in "LM")
    if scripts["HIRAGANA"] + scripts["KATAKANA"]:  # Japanese also writes Chinese characters
        scripts["HIRAGANA"] += scripts.pop("CJK", 0)
    known = {script: number for script, number in scripts.items() if script in _SCRIPTS and number}
    if not known:
        return None
    candidates = _SCRIPTS[max(known, key=known.__getitem__)]
    if len(candidates) == 1:
        return candidates[0]
    words = re.findall(r"[^\W\d_](?:[^\W\d_]|[\u0900-\u0963])*", unicodedata.normalize("NFC", text).lower())
    return max(candidates, key=lambda language: _score(words, language))


def _score(words: list[str], language: str) -> float:
    accents = _ACCENTS.get(language, "")
    foreign = sum(letter not in accents for word in words for letter in word if "\u00df" <= letter <= "\u1eff")
    # in scripts other than Latin, this is the same for all candidates
    return sum(_WEIGHTS[language].get(word, 0.0) for word in words) - 0.5 * foreign


def _script(letter: str) -> str:
    return unicodedata.name(letter, "").partition(" ")[0]
