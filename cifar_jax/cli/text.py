"""Text of others, such as the names of classes and files, made safe to print."""

# The C0 and C1 controls and DEL, which move a cursor, end a line or begin an escape sequence; the separators of lines
# and paragraphs; and what turns the direction of the text around it.
_CONTROLS = [*range(0x20), *range(0x7F, 0xA0), 0x2028, 0x2029, *range(0x202A, 0x202F), *range(0x2066, 0x206A)]
_ESCAPES = {code: chr(code).encode("unicode_escape").decode("ascii") for code in _CONTROLS}


def printable(text: str) -> str:
    r"""The same text with control characters escaped as Python does, `\x1b`; all other characters stay."""
    return text.translate(_ESCAPES)
