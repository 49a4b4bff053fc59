"""A SuperLink's certificate: who vouches for it, for which names, for how long.

Each question is asked by a handshake of its own, so that one thing that is wrong hides no other.
"""

import socket
import ssl
from pathlib import Path
from typing import TYPE_CHECKING

from fedsim.basics.host_port import HostPort
from fedsim.cli.doctor.finding import Finding
from fedsim.cli.doctor.preflight.dates import validity

if TYPE_CHECKING:
    from cryptography.x509 import Certificate

_NO_CHECK_TIME = 0x200000  # X509_V_FLAG_NO_CHECK_TIME, which Python does not name
_RENEW = "deploy/certificates.sh --renew superlink, and start the SuperLink anew"


def look(
    address: HostPort, root: Path | None, timeout_s: float
) -> tuple[list[Finding], ssl.SSLContext | None]:
    """Look at what a server shows of itself in a TLS handshake.

    Args:
        address: Where it is.
        root: The authority's certificate; None takes the authorities of the system.
        timeout_s: How long the handshake may take.

    Returns:
        What was found, and a context with which the server can be asked; None if it speaks no TLS.
        The context trusts it only if nothing is wrong with it.
    """
    from cryptography import x509

    trusting = ssl.create_default_context()
    trusting.check_hostname, trusting.verify_mode = False, ssl.CERT_NONE
    try:
        shown, version = _handshake(address, trusting, timeout_s)
    except (OSError, ValueError) as error:
        found = f"no handshake: {getattr(error, 'reason', None) or error}"
        return [Finding("TLS", "failed", found, "is it the port of the SuperLink?")], None
    certificate = x509.load_der_x509_certificate(shown)
    findings = [Finding("TLS", "ok", version)]
    authority, checking = _authority(address, root, certificate, timeout_s)
    findings += authority
    findings.append(_name(address, shown, certificate, timeout_s))
    findings.append(validity("certificate", certificate, _RENEW))
    sound = all(each.state != "failed" for each in findings) and checking is not None
    return findings, checking if sound else trusting


def speaks_it(address: HostPort, timeout_s: float) -> bool:
    """Tell whether a server speaks TLS."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    try:
        _handshake(address, context, timeout_s)
    except (OSError, ValueError):
        return False
    return True


def _handshake(address: HostPort, context: ssl.SSLContext, timeout_s: float) -> tuple[bytes, str]:
    """The server's certificate, and the version of TLS."""
    with (
        socket.create_connection(address, timeout=timeout_s) as plain,
        context.wrap_socket(plain, server_hostname=address.host) as secured,
    ):
        return secured.getpeercert(binary_form=True) or b"", secured.version() or "TLS"


def _authority(
    address: HostPort, root: Path | None, certificate: "Certificate", timeout_s: float
) -> tuple[list[Finding], ssl.SSLContext | None]:
    """Say whether the authority that is trusted vouches for a certificate."""
    by, name = root or "this system's authorities", "authority"
    try:
        checking = ssl.create_default_context(cafile=root)
    except (OSError, ValueError) as error:
        words = "holds no certificate"
        if not isinstance(error, ssl.SSLError):
            words = getattr(error, "strerror", None) or str(error)
        remedy = "copy public/ca.crt of the folder that deploy/certificates.sh made"
        found = f"--root-certificates {root}: cannot be read: {words}"
        return [Finding(name, "failed", found, remedy)], None
    findings = [] if root is None else _own_validity(root)
    context = ssl.create_default_context(cafile=root)
    context.check_hostname = False
    context.verify_flags |= ssl.VerifyFlags(_NO_CHECK_TIME)
    try:
        _handshake(address, context, timeout_s)
    except ssl.SSLCertVerificationError as error:
        issuer = certificate.issuer.rfc4514_string()
        found = f"'{issuer}' vouches for it, which is none of {by}: {error.verify_message}"
        remedy = "give the public/ca.crt that was made with the SuperLink's certificate"
        return [*findings, Finding(name, "failed", found, remedy)], None
    except OSError as error:
        return [*findings, Finding(name, "failed", f"no handshake: {error}")], None
    return [Finding(name, "ok", f"{by} vouches for it"), *findings], checking


def _own_validity(root: Path) -> list[Finding]:
    """Say how long the authority itself is valid, if that is worth a line."""
    from cryptography import x509

    remedy = "make a new authority: deploy/certificates.sh into another folder, for all nodes"
    found = [
        validity("authority's own", each, remedy)
        for each in x509.load_pem_x509_certificates(root.read_bytes())
    ]
    return [each for each in found if each.state != "ok"]


def _name(address: HostPort, shown: bytes, certificate: "Certificate", timeout_s: float) -> Finding:
    """Say whether a certificate is for the name under which the server was reached."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    # the certificate vouches for itself here: its names alone are looked at
    context.load_verify_locations(cadata=shown)
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN | ssl.VerifyFlags(_NO_CHECK_TIME)
    names = ", ".join(_names(certificate)) or "no name"
    try:
        _handshake(address, context, timeout_s)
    except ssl.SSLCertVerificationError as error:
        if error.verify_code not in (62, 64):  # X509_V_ERR_HOSTNAME_MISMATCH, IP_ADDRESS_MISMATCH
            return Finding("its name", "failed", f"cannot be checked: {error.verify_message}")
        remedy = (
            "reach it by one of these, or make it for this one too: deploy/certificates.sh "
            f"--renew superlink deploy/certificates {address.host}"
        )
        found = f"'{address.host}' is none of its names: {names}"
        return Finding("its name", "failed", found, remedy)
    except OSError as error:
        return Finding("its name", "failed", f"cannot be checked: {error}")
    return Finding("its name", "ok", f"'{address.host}' is among {names}")


def _names(certificate: "Certificate") -> list[str]:
    from cryptography import x509

    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (x509.ExtensionNotFound, ValueError):
        return []
    dns = names.get_values_for_type(x509.DNSName)
    return [*dns, *map(str, names.get_values_for_type(x509.IPAddress))]
