"""Which language a short text is in, told by its script and its most frequent words."""

from __future__ import annotations

import re

_SCRIPTS = {
    "ar": "Arabic",
    "el": "Greek",
    "he": "Hebrew",
    "hi": "Devanagari",
    "ja": "Hiragana",
    "ko": "Hangul",
    "ru": "Cyrillic",
    "zh": "Han",
}
_WORDS = {
    "de": "der die das und ist nicht ein eine zu den von mit für auf ich sie es wir auch wird sind dass an",
    "en": "the of and to in is are that it for with as on this be by you from have can not was or they",
    "es": "el la los las de que y en un una es por con para se no del al su lo como más pero son",
    "fr": "le la les des et est un une dans que qui pour pas sur avec ce il elle nous vous au aux du son",
    "it": "il lo la gli di che è un una per con non si del della sono le come ma anche nel al da i",
    "nl": "de het een en van is dat op te in voor niet met zijn aan er ook die als bij naar dan maar wordt",
    "pt": "o a os as de que e em um uma é para com não se do da dos no na por mais como mas são",
}
_WORDS_OF = {name: frozenset(words.split()) for name, words in _WORDS.items()}
LANGUAGES = tuple(sorted([*_SCRIPTS, *_WORDS]))
"""ISO 639-1 codes that ``is_in_language`` knows."""
_OWN_SCRIPT = 0.5
_LATIN = 0.8


def is_in_language(text: str, language: str) -> bool:
    """Whether ``text`` is in ``language``, one of ``LANGUAGES``.

    A language with a script of its own: half of the letters or more are in it (Japanese: kana or Han, and at
    least one kana). One in Latin letters: four fifths of the letters are Latin, and of the seven languages
    known here none has more of its most frequent words in the text. Text with no such word is in none:
    single words and names are not told apart.
    """
    import regex

    letters = len(regex.findall(r"\p{L}", text))
    if not letters:
        return False

    def share(*scripts: str) -> float:
        found = sum(len(regex.findall(rf"\p{{Script={script}}}", text)) for script in scripts)
        return float(found / letters)

    if language == "ja":
        kana = share("Hiragana", "Katakana")
        return kana > 0 and kana + share("Han") >= _OWN_SCRIPT
    if language == "zh":
        return share("Han") >= _OWN_SCRIPT and share("Hiragana", "Katakana") == 0
    if language in _SCRIPTS:
        return share(_SCRIPTS[language]) >= _OWN_SCRIPT
    words = re.findall(r"\w+", text.casefold())
    hits = {name: sum(word in known for word in words) for name, known in _WORDS_OF.items()}
    return share("Latin") >= _LATIN and hits[language] > 0 and hits[language] == max(hits.values())
