"""What a file seems to be, from its first bytes and the names in its archive."""

from ._errors import FormatError

# protocol 2, LONG1 of 10 bytes: the magic number that torch/serialization.py calls MAGIC_NUMBER
_LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
_SIGNATURES = (
    (0, _LEGACY_MAGIC, "a legacy (non-zip) torch.save file", "Save it again with a torch of 1.6 or later."),
    (0, b"\x93NUMPY", "a numpy .npy file", "Read it with numpy.load."),
    (0, b"\x89HDF", "an HDF5 file", ""),
    (0, b"GGUF", "a GGUF file", ""),
    (257, b"ustar", "a tar archive (torch before 0.1.10 saved those)", ""),
)
_PICKLE = "a bare pickle"


def describe(buffer: memoryview) -> tuple[str, str]:
    """Guess the kind of a file that is not a ZIP archive.

    Args:
        buffer: all bytes of the file.

    Returns:
        What it seems to be, and what its owner may do; ``("", "")`` when nothing fits.

    Examples:
        >>> describe(memoryview(b"GGUF..."))
        ('a GGUF file', '')
    """
    for offset, signature, kind, mend in _SIGNATURES:
        if bytes(buffer[offset : offset + len(signature)]) == signature:
            return kind, mend
    if buffer.nbytes > 9:
        header = int.from_bytes(buffer[:8], "little")
        if 2 <= header <= buffer.nbytes - 8 and buffer[8] == ord("{"):
            return "a safetensors file", "Read it with the safetensors package."
    if buffer.nbytes > 2 and buffer[0] == 0x80 and buffer[1] <= 5:
        return _PICKLE, "Nothing was executed. Save a state_dict with torch.save."
    return "", ""


def torch_prefix(names: tuple[str, ...]) -> str:
    """The folder of the archive that holds a torch.save tree.

    Args:
        names: all record names.

    Returns:
        The prefix, with which ``prefix + "/data.pkl"`` is a record.

    Raises:
        FormatError: the archive is of another kind, or has no single ``*/data.pkl``.

    Examples:
        >>> torch_prefix(("net/data.pkl", "net/version"))
        'net'
    """
    parts = [name.split("/") for name in names]
    second = {part[1] for part in parts if len(part) > 1}
    if "constants.pkl" in second:
        raise not_yet("a TorchScript archive (torch.jit.save)", "Save the module's state_dict with torch.save.")
    if "archive_format" in second or "models" in second:
        raise not_yet("a .pt2 archive (torch.export.save)", "Save the program's state_dict with torch.save.")
    roots = [part[0] for part in parts if len(part) == 2 and part[1] == "data.pkl"]
    if len(roots) == 1:
        return roots[0]
    if not roots and any(name.endswith(".npy") for name in names):
        raise FormatError("a numpy .npz archive", expected="a torch.save archive", mend="Read it with numpy.load.")
    raise FormatError(
        f"a ZIP archive with {len(roots)} records named */data.pkl",
        expected="exactly one, as torch.save writes it",
    )


def not_yet(kind: str, mend: str) -> FormatError:
    """The error for a kind of file that is recognised but not read."""
    return FormatError(kind, expected="a torch.save ZIP archive; this reader does not read that kind yet", mend=mend)
