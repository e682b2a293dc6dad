"""Addresses with and without TLS, channels to them, and why a connection does not come about."""

from __future__ import annotations

import asyncio
import re
import ssl
from dataclasses import dataclass
from pathlib import Path

import grpc

from tensafe.wire.channel import Options

_TARGET = re.compile(
    r"(?:(?P<scheme>grpcs?)://)?"
    r"(?P<host>\[[0-9A-Fa-f:.%]+\]|[A-Za-z0-9_.-]+):(?P<port>[0-9]{1,5})/*"
)
_PROBE_S = 5.0


@dataclass(frozen=True, slots=True)
class Address:
    """Where a coordinator serves; `secure`: with TLS."""

    host: str
    port: int
    secure: bool = False

    @property
    def host_port(self) -> str:
        """`HOST:PORT`."""
        return f"{self.host}:{self.port}"

    @property
    def is_loopback(self) -> bool:
        """Whether it is this machine."""
        host = self.host.strip("[]")
        return host in {"localhost", "::1"} or host.startswith("127.")

    def __str__(self) -> str:
        return f"{'grpcs' if self.secure else 'grpc'}://{self.host_port}"


@dataclass(frozen=True, slots=True)
class Mismatch:
    """Why a server cannot be talked to: `problem` follows the address in a sentence."""

    problem: str
    remedy: str


def parse_address(target: str) -> Address:
    """Reads `grpcs://HOST:PORT` (TLS), `grpc://HOST:PORT` or `HOST:PORT` (plain text).

    Raises:
        ValueError: naming the target, for another scheme, or a missing or impossible port.
    """
    match = _TARGET.fullmatch(target.strip())
    if match is None or not 0 < int(match["port"]) < 65536:
        raise ValueError(f"{target!r} is not grpcs://HOST:PORT, grpc://HOST:PORT or HOST:PORT")
    return Address(match["host"], int(match["port"]), match["scheme"] == "grpcs")


def read_authorities(path: str | Path) -> bytes:
    """Reads a PEM file of certificate authorities.

    Raises:
        ValueError: naming the file, if it cannot be read or holds no certificate.
    """
    try:
        content = Path(path).read_bytes()
        ssl.create_default_context(cadata=content.decode("ascii"))
    except OSError as error:  # an SSLError too
        why = error.strerror if not isinstance(error, ssl.SSLError) else "it holds no certificate"
        raise ValueError(f"certificate authority {str(path)!r} cannot be used: {why}") from error
    except ValueError as error:
        raise ValueError(f"certificate authority {str(path)!r} is no PEM file") from error
    return content


def open_channel(address: Address, authorities: bytes | None, options: Options) -> grpc.aio.Channel:
    """Makes a channel, with TLS where the address asks for it.

    Args:
        address: where to.
        authorities: who may have signed the server's certificate, PEM. None: the well-known ones.
        options: of the channel.
    """
    if not address.secure:
        return grpc.aio.insecure_channel(address.host_port, options=options)
    credentials = grpc.ssl_channel_credentials(authorities)
    return grpc.aio.secure_channel(address.host_port, credentials, options=options)


async def find_mismatch(address: Address, authorities: bytes | None) -> Mismatch | None:
    """Asks a server that gRPC could not connect to whether TLS is the reason.

    Returns:
        What is wrong and what to do; None if the reason is another, such as nobody listening.
    """
    context = ssl.create_default_context(cadata=authorities.decode() if authorities else None)
    if not address.secure:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE  # nothing is sent: only whether it answers in TLS
    context.set_alpn_protocols(["h2"])
    host = address.host.strip("[]")
    try:
        async with asyncio.timeout(_PROBE_S):
            _, writer = await asyncio.open_connection(host, address.port, ssl=context)
    except ssl.SSLCertVerificationError as error:
        return Mismatch(
            f"has a certificate that is not accepted: {error.verify_message}",
            "name the authority that signed it with --ca FILE, ca= or TENSAFE_CA, and use a host "
            "name that stands in it",
        )
    except ssl.SSLError:
        if not address.secure:
            return None
        return Mismatch(
            "does not speak TLS",
            f"use grpc://{address.host_port}, or serve with --tls-cert and --tls-key",
        )
    except (OSError, TimeoutError):
        return None
    writer.close()
    if address.secure:
        return None
    return Mismatch(
        "speaks TLS only",
        f"use grpcs://{address.host_port}, with --ca FILE, ca= or TENSAFE_CA if its authority is "
        "your own",
    )
