"""The one exception for files that this room will not read."""

_MAX_PART = 1000  # characters of one part of a message


class FormatError(ValueError):
    """A file is damaged, hostile, or of a kind that the reader does not read.

    The parts of the message are attributes too, so that a caller can report them in its own way.

    Args:
        found: what the file has.
        expected: what the format asks for at that place.
        mend: what the owner of the file can most likely do about it.
        place: record, byte offset and opcode, as far as they are known.
        file: path of the file, or ``"<bytes>"``.

    Examples:
        >>> print(FormatError("3 bytes", expected="4", place="record 'data/0'", file="m.pt", mend="Copy it again."))
        m.pt: record 'data/0': found 3 bytes; expected 4. Copy it again.
    """

    def __init__(self, found: str, *, expected: str = "", mend: str = "", place: str = "", file: str = "") -> None:
        super().__init__(found)
        # Here once and for all, whatever quotes its text and whatever forgets to: a message goes to a terminal.
        self.found = _printable(found)
        self.expected = _printable(expected)
        self.mend = mend
        self.place = place
        self.file = file

    def locate(self, *, file: str = "", place: str = "") -> None:
        """Fill in where the trouble is, unless code closer to it has already said so.

        Args:
            file: path of the file, or ``"<bytes>"``.
            place: record, byte offset and opcode.
        """
        self.file = self.file or file
        self.place = self.place or place

    def __str__(self) -> str:
        where = ": ".join(_printable(part) for part in (self.file, self.place) if part)
        text = f"{where}: found {self.found}" if where else f"found {self.found}"
        if self.expected:
            text += f"; expected {self.expected}"
        return f"{text}. {self.mend}" if self.mend else f"{text}."


def _printable(text: str) -> str:
    text = text if len(text) <= _MAX_PART else text[:_MAX_PART] + "..."
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def quoted(text: str, width: int = 120) -> str:
    r"""Text from a file as one short printable ASCII line, so that a hostile name cannot forge or flood a message.

    Args:
        text: any text.
        width: how many characters of it to keep.

    Returns:
        The quoted text.

    Examples:
        >>> print(quoted("a\nb"))
        'a\nb'
    """
    return ascii(text if len(text) <= width else text[:width] + "...")
