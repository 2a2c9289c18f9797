"""An extension of Griffe, which reads the code for the API reference: fields are described by their comments.

A comment at the end of a field's line, or above it, takes the place of a docstring. mkdocs.yml names this file.
"""

import griffe


class FieldComments(griffe.Extension):
    def on_attribute_instance(self, *, attr: griffe.Attribute, **_) -> None:
        if attr.docstring is not None or not isinstance(attr.parent, griffe.Class) or attr.lineno is None:
            return
        if comment := comment_of(attr.lines_collection[attr.filepath], attr.lineno, attr.endlineno or attr.lineno):
            attr.docstring = griffe.Docstring(comment, lineno=attr.lineno, parent=attr)


def comment_of(lines: list[str], first: int, last: int) -> str:
    """The comments above line `first` (from 1) and behind line `last`, as one text."""
    above = []
    for line in reversed(lines[: first - 1]):
        if not line.strip().startswith("#"):
            break
        above.insert(0, line.strip().removeprefix("#").strip())
    _, found, behind = lines[last - 1].rpartition("  # ")
    return " ".join([*above, behind] if found else above)
