"""The coordinator's certificate."""

from __future__ import annotations

import ssl
from dataclasses import dataclass, field
from pathlib import Path

import grpc


class CertificateError(RuntimeError):
    """A certificate or key that cannot be served with."""


@dataclass(frozen=True, slots=True)
class Certificate:
    """A certificate with the chain to its authority, and its private key; both PEM."""

    chain: bytes
    key: bytes = field(repr=False)

    @classmethod
    def read(cls, chain: Path, key: Path) -> Certificate:
        """Reads both files and checks that they belong together.

        Raises:
            CertificateError: naming the files and what is wrong.
        """
        try:
            certificate = cls(chain.read_bytes(), key.read_bytes())
            # An empty password makes an encrypted key an error instead of a question.
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(chain, key, password="")
        except OSError as error:  # an SSLError too
            why = error.reason if isinstance(error, ssl.SSLError) else error.strerror
            raise CertificateError(
                f"cannot serve with --tls-cert {chain} and --tls-key {key}: {why}; give a PEM "
                "certificate (with its chain) and the unencrypted PEM key that belongs to it"
            ) from error
        return certificate

    def credentials(self) -> grpc.ServerCredentials:
        """What gRPC serves with."""
        return grpc.ssl_server_credentials([(self.key, self.chain)])
