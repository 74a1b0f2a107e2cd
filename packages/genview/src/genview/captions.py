"""How strongly a caption should guide a generator: the simpler the caption, the more.

A rule-based scorer that needs no model, and a function that takes any instruction model as a callable.
"""

import re
from collections.abc import Callable

GUIDANCE = {1: 8.0, 2: 6.0, 3: 4.0, 4: 2.0}
"""Guidance scale of each class of complexity, as in GenView++'s script."""
_BOUNDS = (0, 3, 6)
_NUMBERS = "one two three four five six seven eight nine ten several many few pair couple dozen"
_COLORS = "red green blue yellow orange purple pink brown black white gray golden silver beige teal turquoise"
_MATERIALS = "wooden wood metal metallic stone brick glass plastic leather concrete cotton silk paper marble steel iron"
_PLACES = "on under above below behind beside near over between inside outside beneath atop against along across around"
_ADJECTIVES = (
    "big small large little tall short long old young new bright dark tiny huge round square open closed wet dry cold hot"
    " empty full clean dirty smiling sunny cloudy snowy grassy beautiful modern ancient rusty striped fluffy"
)
_WORDS = frozenset(f"{_NUMBERS} {_COLORS} {_MATERIALS} {_PLACES} {_ADJECTIVES}".split())
PROMPT = (
    "Rate how many concrete visual constraints this caption names: 1 for none, 2 for one to three, 3 for four to six,"
    " 4 for more. Answer with the digit alone.\nCaption: {caption}"
)
"""What an instruction model is asked by ``asked_complexity``."""


def constraints(caption: str) -> int:
    """Number of concrete visual constraints of a caption: numerals, colors, materials, places, adjectives, verbs in -ing.

    A list of common words and two endings, English only; it knows no grammar.
    """
    words = re.findall(r"[^\W\d_]+|\d+", caption.lower())
    return sum(w in _WORDS or w.isdigit() or (len(w) > 5 and w.endswith(("ing", "ish"))) for w in words)


def complexity(caption: str) -> int:
    """1 (no constraint), 2 (1 to 3), 3 (4 to 6) or 4 (more)."""
    return 1 + sum(constraints(caption) > bound for bound in _BOUNDS)


def asked_complexity(caption: str, ask: Callable[[str], str], *, retries: int = 5) -> int:
    """The same from an instruction model; the rules decide where it gives no digit from 1 to 4.

    Args:
        caption: the caption.
        ask: takes a prompt and gives the model's answer.
        retries: answers without a digit after which the rules decide.
    """
    for _ in range(1 + retries):
        found = re.search(r"(?<!\d)[1-4](?!\d)", ask(PROMPT.format(caption=caption)))
        if found:
            return int(found[0])
    return complexity(caption)


def guidance_of(caption: str, ask: Callable[[str], str] | None = None) -> float:
    """Guidance scale for a caption.

    Source: GenView++, arXiv 2509.23770; the four classes and their scales are those of the authors' script, the offline rules
        are ours.
    """
    return GUIDANCE[complexity(caption) if ask is None else asked_complexity(caption, ask)]
