"""Probes of language drift: a question in one language is to be answered in it."""

from __future__ import annotations

from random import Random

from adapterhub.cards.suites.drafts import SENTENCES, Draft, ask

_QUESTIONS = {
    "de": (
        ("Beschreibe {} in zwei Sätzen.", "Was ist an {} schön? Antworte in ganzen Sätzen."),
        ("den Winter", "das Meer", "einen Wald", "die Stadt Berlin", "den Mond", "das Frühstück"),
    ),
    "en": (
        ("Describe {} in two sentences.", "What is nice about {}? Answer in full sentences."),
        ("the winter", "the sea", "a forest", "the city of London", "the moon", "breakfast"),
    ),
    "es": (
        ("Describe {} en dos frases.", "¿Qué tiene de bonito {}? Responde con frases completas."),
        ("el invierno", "el mar", "un bosque", "la ciudad de Madrid", "la luna", "el desayuno"),
    ),
    "fr": (
        ("Décris {} en deux phrases.", "Qu'est-ce qui est beau dans {} ? Réponds par des phrases complètes."),
        ("l'hiver", "la mer", "une forêt", "la ville de Paris", "la lune", "le petit déjeuner"),
    ),
    "it": (
        ("Descrivi {} in due frasi.", "Che cosa c'è di bello in questo: {}? Rispondi con frasi complete."),
        ("l'inverno", "il mare", "un bosco", "la città di Roma", "la luna", "la colazione"),
    ),
    "nl": (
        ("Beschrijf {} in twee zinnen.", "Wat is er mooi aan {}? Antwoord in hele zinnen."),
        ("de winter", "de zee", "een bos", "de stad Amsterdam", "de maan", "het ontbijt"),
    ),
    "pt": (
        ("Descreve {} em duas frases.", "O que é bonito em {}? Responde com frases completas."),
        ("o inverno", "o mar", "uma floresta", "a cidade de Lisboa", "a lua", "o pequeno-almoço"),
    ),
}


def draw_question(rng: Random) -> Draft:
    """A question in one of seven languages, told apart by their frequent words (``cards.languages``)."""
    language = rng.choice(list(_QUESTIONS))
    questions, things = _QUESTIONS[language]
    text = rng.choice(questions).format(rng.choice(things))
    return ask(text, {"type": "language", "language": language}, SENTENCES)
