"""Authorities, certificates and servers of 127.0.0.1, right and wrong."""

import contextlib
import datetime
import email.utils
import http.server
import ipaddress
import socketserver
import ssl
import threading
import time
from typing import NamedTuple

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedsim.basics.host_port import HostPort


class Pair(NamedTuple):
    """A certificate and its key."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    def write(self, certificate, key=None):
        """Write both as PEM; returns the certificate's file."""
        certificate.parent.mkdir(parents=True, exist_ok=True)
        certificate.write_bytes(self.certificate.public_bytes(serialization.Encoding.PEM))
        if key is not None:
            key.write_bytes(
                self.key.private_bytes(
                    serialization.Encoding.PEM,
                    serialization.PrivateFormat.PKCS8,
                    serialization.NoEncryption(),
                )
            )
        return certificate


def pair(name, *, by=None, names=("127.0.0.1",), days=(-1, 365)):
    """A certificate from so many days to so many days from now; without `by` an authority's own."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    signing = key if by is None else by.key
    issuer = subject if by is None else by.certificate.subject
    begins, ends = (now + datetime.timedelta(days=each) for each in days)
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(begins)
        .not_valid_after(ends)
        .add_extension(x509.BasicConstraints(ca=by is None, path_length=None), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(signing.public_key()),
            critical=False,
        )
        .add_extension(_usage(authority=by is None), critical=True)
    )
    if by is not None:
        alternatives = [_alternative(each) for each in names]
        usage = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH])
        builder = builder.add_extension(usage, critical=False).add_extension(
            x509.SubjectAlternativeName(alternatives), critical=False
        )
    return Pair(builder.sign(signing, hashes.SHA256()), key)


def _usage(*, authority):
    flags = dict.fromkeys(
        ("content_commitment", "key_encipherment", "data_encipherment", "key_agreement",
         "encipher_only", "decipher_only"), False,
    )  # fmt: skip
    return x509.KeyUsage(
        digital_signature=not authority, key_cert_sign=authority, crl_sign=authority, **flags
    )


def _alternative(name):
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


@contextlib.contextmanager
def serving(folder=None, shown=None, *, status=200, ahead_s=0.0, dated=True):
    """A server that answers `/health`; by TLS with the pair that it shows. Yields its address."""

    class Health(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response_only(status if self.path == "/health" else 404)
            if dated:
                date = email.utils.formatdate(time.time() + ahead_s, usegmt=True)
                self.send_header("Date", date)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_):
            pass

    class Server(http.server.ThreadingHTTPServer):
        def handle_error(self, *_):
            pass

        def finish_request(self, request, address):
            request.settimeout(10)
            with context.wrap_socket(request, server_side=True) if shown else request as secured:
                super().finish_request(secured, address)

    if shown is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        shown.write(folder / "shown.pem", folder / "shown.key")
        context.load_cert_chain(folder / "shown.pem", folder / "shown.key")
    with _started(Server(("127.0.0.1", 0), Health)) as address:
        yield address


@contextlib.contextmanager
def saying(answer, seconds=0.0):
    """A server that says the same to everybody after a while, whatever it is told."""

    class Same(socketserver.BaseRequestHandler):
        def handle(self):
            time.sleep(seconds)
            self.request.sendall(answer)

    server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Same)
    server.daemon_threads = True
    with _started(server) as address:
        yield address


@contextlib.contextmanager
def _started(server):
    with server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield HostPort("127.0.0.1", server.server_address[1])
        finally:
            server.shutdown()
            thread.join()
