"""A folder of certificates and keys, as `deploy/certificates.sh` makes it."""

import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from fedsim.cli.doctor.finding import Finding
from fedsim.cli.doctor.preflight.dates import validity

if TYPE_CHECKING:
    from cryptography.x509 import Certificate

_CERTIFICATES, _SECRETS = (".crt", ".pem"), (".key", ".secret")


def look(folder: Path) -> list[Finding]:
    """Look at every certificate and key below a folder.

    Args:
        folder: The folder, or that of one service.
    """
    name = "certificates"
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "there is no such folder"
        return [Finding(name, "failed", f"{folder}: {what}", "deploy/certificates.sh makes one")]
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    shown = list(_certificates(folder, [f for f in files if f.suffix in _CERTIFICATES]))
    if not shown:
        found = f"{folder}: holds no certificate (*.crt, *.pem)"
        shown = [Finding(name, "failed", found, "deploy/certificates.sh makes them")]
    return [*shown, *_keys(folder, [f for f in files if f.suffix in _SECRETS])]


def _certificates(folder: Path, files: list[Path]) -> Iterator[Finding]:
    from cryptography import x509

    told: set[bytes] = set()
    for path in files:
        name = path.relative_to(folder).as_posix()
        try:
            content = path.read_bytes()
            held = x509.load_pem_x509_certificates(content)
        except (OSError, ValueError) as error:
            words = getattr(error, "strerror", None) or "holds no certificate"
            yield Finding(name, "failed", f"cannot be read: {words}", "make it anew")
            continue
        if content in told:  # an authority's, which lies in the folder of each service
            continue
        told.add(content)
        remedy = _remedy(folder, path)
        first = min(held, key=lambda each: each.not_valid_after_utc)
        yield validity(name, first, remedy)
        yield from _unlike_its_neighbours(name, path, held[0], remedy)


def _remedy(folder: Path, path: Path) -> str:
    if path.name == "ca.crt":
        return "a new authority: deploy/certificates.sh into another folder, for all nodes"
    service = path.parent.name if path.parent != folder else folder.absolute().name
    return f"deploy/certificates.sh --renew {service}, and start it anew"


def _unlike_its_neighbours(
    name: str, path: Path, held: "Certificate", remedy: str
) -> Iterator[Finding]:
    """Hold a service's certificate against the authority and the key that lie beside it."""
    from cryptography import x509
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives import serialization

    authority, key = path.with_name("ca.crt"), path.with_suffix(".key")
    if authority.is_file() and authority != path:
        try:
            held.verify_directly_issued_by(x509.load_pem_x509_certificate(authority.read_bytes()))
        except (InvalidSignature, ValueError, TypeError, OSError):
            yield Finding(name, "failed", "the ca.crt beside it does not vouch for it", remedy)
    if key.is_file():
        try:
            own = serialization.load_pem_private_key(key.read_bytes(), None).public_key()
            if own != held.public_key():
                yield Finding(name, "failed", f"{key.name} beside it is not its key", remedy)
        except (ValueError, TypeError, OSError) as error:
            words = getattr(error, "strerror", None) or "it holds no key that can be used"
            yield Finding(name, "failed", f"{key.name} beside it cannot be read: {words}", remedy)


def _keys(folder: Path, files: list[Path]) -> Iterator[Finding]:
    """Say who else may read the keys and secrets."""
    for path in files:
        if path.name == "authority.key":
            found = f"{path.name} opens every service, and lies in a folder that nodes are given"
            name = path.relative_to(folder).as_posix()
            yield Finding(name, "failed", found, "move it away: certificates.sh --authority FOLDER")
    open_ = [path.relative_to(folder).as_posix() for path in files if _is_open(path, folder)]
    if open_:
        found = f"other users of this machine may read or change {', '.join(open_)}"
        yield Finding("keys", "failed", found, f"chmod 700 {folder}")
    elif files:
        found = f"{len(files)}, which their owner alone reaches"
        yield Finding("keys", "ok", found)


def _is_open(path: Path, folder: Path) -> bool:
    """Whether a group or others may read or change a file, and enter the folders on the way."""
    ways = [path.parent, *path.parent.parents]
    modes = [stat.S_IMODE(os.stat(each).st_mode) for each in ways[: ways.index(folder) + 1]]
    mode = stat.S_IMODE(os.stat(path).st_mode)
    return any(
        mode & (0o6 << shift) and all(each & (0o1 << shift) for each in modes) for shift in (0, 3)
    )
