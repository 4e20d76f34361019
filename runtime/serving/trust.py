"""Whether machine code was compiled on this machine by this user: a key in the user's cache signs
what was.

The signature is an HMAC over the names and hashes of the files; it stands in the manifest.  Nobody
without the key can make one, so a folder that came from elsewhere never carries a valid one.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import secrets
import stat
from collections.abc import Iterable
from functools import cache
from pathlib import Path

log = logging.getLogger(__name__)

KEY_BYTES = 32
CODE_SUFFIXES = frozenset(
    {".pt2", ".so", ".dll", ".dylib", ".pyd", ".o", ".a", ".exe", ".node", ".cubin", ".ptx"}
)
CODE_MAGIC = (b"\x7fELF", b"MZ\x90\x00", b"\xcf\xfa\xed\xfe", b"\xca\xfe\xba\xbe")


def key_file() -> Path:
    """Where the key of this user lies."""
    base = Path.home() / ".cache"
    if cache_home := os.environ.get("XDG_CACHE_HOME"):
        base = Path(cache_home)
    return base / "secateur" / "trust.key"


def sign(files: Iterable[Path]) -> str:
    """The signature of files that were compiled here.

    Args:
        files: of one folder; they are told apart by name.

    Returns:
        hex digits.
    """
    return _signature(_key(key_file()), files)


def is_signed(files: Iterable[Path], signature: object) -> bool:
    """Whether files carry a signature of this user's key.

    Args:
        files: as they lie there now; they are read.
        signature: what the manifest says.
    """
    if not isinstance(signature, str) or not signature.isascii():
        return False
    return hmac.compare_digest(_signature(_key(key_file()), files), signature)


def machine_code(files: Iterable[Path]) -> list[Path]:
    """Those of some files that hold machine code, by their ending or their first bytes; none is
    opened further.

    Args:
        files: to look at; what is no regular file is passed over.
    """
    code_files = list[Path]()
    for file in files:
        if not file.is_file():
            continue
        if file.suffix.lower() in CODE_SUFFIXES:
            code_files.append(file)
            continue
        with file.open("rb") as stream:
            if stream.read(4) in CODE_MAGIC:
                code_files.append(file)
    return code_files


def _signature(key: bytes, files: Iterable[Path]) -> str:
    signed = hmac.new(key, digestmod=hashlib.sha256)
    for file in sorted(files, key=lambda file: file.name):
        with file.open("rb") as stream:
            content = hashlib.file_digest(stream, "sha256").digest()
        name = file.name.encode("utf-8", "surrogateescape")
        signed.update(len(name).to_bytes(8, "little") + name + content)
    return signed.hexdigest()


@cache
def _key(file: Path) -> bytes:
    """The user's key, made at first use; one of this process alone where none can be kept
    safely."""
    try:
        if not file.exists():
            _make(file)
        return _read(file)
    except OSError as error:
        log.warning("compiled packages are trusted in this process only: %s", error)
        return secrets.token_bytes(KEY_BYTES)


def _make(file: Path) -> None:
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    part = file.with_name(f".{file.name}-{os.getpid()}-{secrets.token_hex(4)}")
    descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        os.write(descriptor, secrets.token_bytes(KEY_BYTES))
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    try:
        os.link(part, file)  # unlike a rename, it leaves the key of a faster process alone
    except FileExistsError:
        pass
    finally:
        part.unlink()


def _read(file: Path) -> bytes:
    descriptor = os.open(file, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        facts = os.fstat(descriptor)
        if facts.st_uid != os.geteuid():
            raise PermissionError(f"{file} belongs to another user: delete it")
        if stat.S_IMODE(facts.st_mode) & 0o077:
            raise PermissionError(
                f"{file} can be read or written by others: delete it, a new one is made"
            )
        key = os.read(descriptor, KEY_BYTES + 1)
    finally:
        os.close(descriptor)
    if len(key) != KEY_BYTES:
        raise PermissionError(
            f"{file} holds no key of {KEY_BYTES} bytes: delete it, a new one is made"
        )
    return key
