"""A fingerprint of the weights that answer: a run's base and adapter, a plain model, or a .gguf file as it is."""

from hashlib import sha256
from pathlib import Path

from sbtiny.errors import InputError
from sbtiny.models.adapters import FILES

WHOLE_BYTES = 64 << 20  # a larger file is read in samples
BLOCK, BLOCKS = 64 << 10, 256


def policy_fingerprint(base: str, four_bit: bool, adapter: Path | None) -> str:
    """Hash the base's fingerprint, whether it is loaded in 4 bits, and the adapter's files. Raises InputError for a missing file."""
    parts = [base, "nf4" if four_bit else "", *([file_fingerprint(adapter / name) for name in FILES] if adapter else [])]
    return sha256(" ".join(parts).encode()).hexdigest()[:16]


def file_fingerprint(file: Path) -> str:
    """Hash the size and content of a file; of a large one the first block, the last, and BLOCKS between. 4 GB take under a second."""
    try:
        size = file.stat().st_size
        digest = sha256(str(size).encode())
        with file.open("rb") as opened:
            if size <= WHOLE_BYTES:
                digest.update(opened.read())
            for i in range(BLOCKS + 1) if size > WHOLE_BYTES else ():
                opened.seek((size - BLOCK) * i // BLOCKS)
                digest.update(opened.read(BLOCK))
    except OSError as error:
        raise InputError(f"cannot read {file}: {error.strerror or error}") from error
    return digest.hexdigest()[:16]
