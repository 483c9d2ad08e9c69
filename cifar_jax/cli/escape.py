"""Escaping of untrusted text, such as names of classes and files, for printing."""

# The C0 and C1 controls and DEL, which move the cursor, end a line or start an escape sequence; the line and paragraph
# separators; and the bidirectional overrides.
_CONTROLS = [*range(0x20), *range(0x7F, 0xA0), 0x2028, 0x2029, *range(0x202A, 0x202F), *range(0x2066, 0x206A)]
_ESCAPES = {code: chr(code).encode("unicode_escape").decode("ascii") for code in _CONTROLS}


def printable(text: str) -> str:
    r"""Escapes control characters as Python does, as `\x1b`; other characters stay."""
    return text.translate(_ESCAPES)
