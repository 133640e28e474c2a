"""What a file seems to be, from its first bytes and the names in its archive."""

from ._errors import FormatError

_SIGNATURES = (
    (0, b"\x93NUMPY", "a numpy .npy file", "Read it with numpy.load."),
    (0, b"\x89HDF", "an HDF5 file", ""),
    (0, b"GGUF", "a GGUF file", ""),
    (257, b"ustar", "a tar archive (torch before 0.1.10 saved those)", ""),
)
_PICKLE = "a bare pickle"


def describe(buffer: memoryview) -> tuple[str, str]:
    """Guess the kind of a file that is not read.

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
    if buffer.nbytes > 2 and buffer[0] == 0x80 and buffer[1] <= 5:
        return _PICKLE, "Nothing was executed. Save a state_dict with torch.save."
    return "", ""


def archive_kind(names: tuple[str, ...]) -> tuple[str, str]:
    """Which program wrote a ZIP archive.

    Args:
        names: all record names.

    Returns:
        ``"torch_zip"``, ``"torchscript"`` or ``"pt2"``; and the folder of its records, which is empty for ``.pt2`` files
        that torch wrote before 2.8.

    Raises:
        FormatError: the archive is of another kind, or has no single ``*/data.pkl``.

    Examples:
        >>> archive_kind(("net/data.pkl", "net/version"))
        ('torch_zip', 'net')
    """
    if "serialized_exported_program.json" in names:
        return "pt2", ""
    parts = [name.split("/", 2) for name in names]
    for kind, mark in (("torchscript", "constants.pkl"), ("pt2", "archive_format")):
        marked = [part[0] for part in parts if part[1:] == [mark]]
        if len(marked) == 1:
            return kind, marked[0]
    roots = [part[0] for part in parts if part[1:] == ["data.pkl"]]
    if len(roots) == 1:
        return "torch_zip", roots[0]
    if not roots and any(name.endswith(".npy") for name in names):
        raise FormatError("a numpy .npz archive", expected="a torch.save archive", mend="Read it with numpy.load.")
    raise FormatError(
        f"a ZIP archive with {len(roots)} records named */data.pkl",
        expected="exactly one, as torch.save writes it",
    )
