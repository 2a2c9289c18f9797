"""Texts from data, models, file names and errors, on their way to a terminal."""

import unicodedata

LINE_ENDS_AND_TABS = str.maketrans("", "", "\n\t")
# Control characters, formats such as the direction of writing, halves of surrogate pairs, and the two line ends that
# some terminals obey.
HIDDEN_CATEGORIES = ("Cc", "Cf", "Cs", "Zl", "Zp")
# Formats that letters of Persian and of Indian scripts, and many emoji, are made with.
JOINERS = "\u200c\u200d"


def printable(text: str) -> str:
    """`text` with what a terminal would obey or not show written as \\x1b or \\u202e; line ends and tabs stay.

    Only for people to read: files keep the text as it is.
    """
    if text.translate(LINE_ENDS_AND_TABS).isprintable():  # almost always
        return text
    return "".join(map(_printable_character, text))


def _printable_character(character: str) -> str:
    is_shown = unicodedata.category(character) not in HIDDEN_CATEGORIES
    if is_shown or character in "\n\t" or character in JOINERS:
        return character
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
