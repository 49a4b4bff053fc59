"""How long a certificate is still valid."""

from datetime import UTC, datetime
from typing import TYPE_CHECKING

from fedsim.cli.doctor.finding import Finding

if TYPE_CHECKING:
    from cryptography.x509 import Certificate

WARN_DAYS = 30


def validity(name: str, certificate: "Certificate", remedy: str) -> Finding:
    """Say how many days a certificate has left.

    Args:
        name: What to call it.
        certificate: The certificate.
        remedy: What to do when there are few or none.
    """
    now = datetime.now(UTC)
    begins, ends = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if now > ends:
        return Finding(name, "failed", f"expired on {_day(ends)}", remedy)
    if now < begins:
        found = f"not valid before {_day(begins)}, and this clock says {_day(now)}"
        return Finding(name, "failed", found, "set this machine's clock, or make it anew")
    days = (ends - now).days
    found = f"valid until {_day(ends)}, {days} days left"
    if days < WARN_DAYS:
        return Finding(name, "note", found, remedy)
    return Finding(name, "ok", found)


def _day(when: datetime) -> str:
    return when.strftime("%Y-%m-%d %H:%M UTC")
