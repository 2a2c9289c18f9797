"""Makes texts from data, models, file names and errors safe to print on a terminal."""

import unicodedata

LINE_ENDS_AND_TABS = str.maketrans("", "", "\n\t")
# Control characters, formats such as the direction of writing, halves of surrogate pairs, and Unicode's two line ends,
# which some terminals obey.
HIDDEN_CATEGORIES = ("Cc", "Cf", "Cs", "Zl", "Zp")
# Format characters that Persian, Indian scripts and many emoji need.
JOINERS = "\u200c\u200d"


def printable(text: str) -> str:
    """`text` with control and invisible characters written as \\x1b or \\u202e. Line ends and tabs stay.

    Only for texts that people read: files keep the text as it is.
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
