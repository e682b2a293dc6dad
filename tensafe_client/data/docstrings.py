"""Real text that every machine has: the docstrings of Python's own standard library.

Pairs (name and signature → first line of the docstring) from about 100 modules, PSF licence. They
depend on the Python version only, and are held out by module, so that no held-out function has a
sibling in the training set.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from tensafe_client.checks import check_number, check_strings
from tensafe_client.data.jsonl import Example
from tensafe_client.errors import ConfigError

# Modules whose import does nothing but define names, and which no library of ours patches (torch
# replaces a function of `inspect`).
# fmt: off
MODULES = (
    "abc", "argparse", "array", "ast", "asyncio", "base64", "bdb", "bisect", "bz2", "calendar",
    "cmath", "cmd", "code", "codecs", "collections", "collections.abc", "colorsys",
    "compileall", "concurrent.futures", "configparser", "contextlib", "copy", "csv",
    "dataclasses", "datetime", "decimal", "difflib", "dis", "doctest", "email.headerregistry",
    "email.message", "email.utils", "enum", "filecmp", "fileinput", "fnmatch", "fractions",
    "ftplib", "functools", "getpass", "gettext", "glob", "graphlib", "gzip", "hashlib", "heapq",
    "hmac", "html", "html.parser", "http.client", "http.cookies", "imaplib",
    "importlib.metadata", "importlib.resources", "io", "ipaddress", "itertools",
    "json", "keyword", "linecache", "locale", "logging", "logging.config", "logging.handlers",
    "lzma", "mailbox", "math", "mimetypes", "multiprocessing.pool", "netrc", "numbers",
    "operator", "os", "os.path", "pathlib", "pdb", "pickletools", "pkgutil", "platform",
    "plistlib", "poplib", "pprint", "profile", "pstats", "py_compile", "pyclbr", "queue",
    "quopri", "random", "re", "reprlib", "runpy", "sched", "secrets", "selectors", "shelve",
    "shlex", "shutil", "signal", "smtplib", "socket", "socketserver", "sqlite3", "ssl", "stat",
    "statistics", "string", "struct", "subprocess", "symtable", "sysconfig", "tarfile",
    "tempfile", "textwrap", "threading", "timeit", "token", "tokenize", "trace", "traceback",
    "types", "typing", "unittest", "unittest.mock", "urllib.parse", "urllib.request",
    "urllib.robotparser", "uuid", "warnings", "wave", "weakref", "xml.dom.minidom",
    "xml.etree.ElementTree", "xml.sax.saxutils", "xmlrpc.client", "zipapp", "zipfile",
    "zipimport", "zlib",
)
# fmt: on


@dataclass(frozen=True)
class DocstringPair:
    """A name with its signature, and the first line of its docstring."""

    module: str
    name: str
    signature: str
    summary: str

    def example(self) -> Example:
        """Returns the pair as a conversation: the question, and the answer that is learned."""
        question = f"What does `{self.module}.{self.name}{self.signature}` do?"
        return Example(
            messages=(
                {"role": "user", "content": question},
                {"role": "assistant", "content": self.summary},
            )
        )


def docstring_pairs(modules: Sequence[str] = MODULES) -> list[DocstringPair]:
    """Collects the pairs, in the order of the modules and of their names; the same each time.

    A module that this Python lacks is passed over.

    Raises:
        ConfigError: if `modules` is no list of names.
    """
    pairs: list[DocstringPair] = []
    seen: set[str] = set()
    for name in check_strings("modules", modules):
        module = _import(name)
        if module is None:
            continue
        for pair in _of_module(module):
            if pair.summary not in seen:  # inherited and aliased docstrings come once
                seen.add(pair.summary)
                pairs.append(pair)
    return pairs


def split_by_module(
    pairs: Sequence[DocstringPair], *, held_out: float = 0.1
) -> tuple[list[DocstringPair], list[DocstringPair]]:
    """Splits into training and held-out pairs; a module is wholly in one of them.

    Args:
        pairs: what `docstring_pairs` gives.
        held_out: about this share of the modules, chosen by a hash of their names.

    Raises:
        ConfigError: for a value of a wrong type.
    """
    share_held_out = check_number("held_out", held_out)
    if not isinstance(pairs, Sequence) or not all(isinstance(one, DocstringPair) for one in pairs):
        raise ConfigError.of(
            "pairs", "must be a list of DocstringPair, as docstring_pairs gives it"
        )
    train: list[DocstringPair] = []
    test: list[DocstringPair] = []
    for pair in pairs:
        digest = hashlib.sha256(pair.module.encode()).digest()
        share = int.from_bytes(digest[:4], "big") / 2**32
        (test if share < share_held_out else train).append(pair)
    return train, test


def _import(name: str) -> ModuleType | None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        try:
            return importlib.import_module(name)
        except ImportError:  # not built into this Python, or removed from it
            return None


def _of_module(module: ModuleType) -> Iterator[DocstringPair]:
    for name, value in _members(module):
        if inspect.isclass(value):
            yield from _pair(module, name, value)
            for method, function in _members(value):
                yield from _pair(module, f"{name}.{method}", function)
        elif callable(value):
            yield from _pair(module, name, value)


def _members(owner: Any) -> list[tuple[str, Any]]:
    names = getattr(owner, "__all__", None) if isinstance(owner, ModuleType) else None
    chosen = names if names is not None else [n for n in vars(owner) if not n.startswith("_")]
    return [(name, vars(owner)[name]) for name in sorted(chosen) if name in vars(owner)]


def _pair(module: ModuleType, name: str, value: Any) -> Iterator[DocstringPair]:
    value = getattr(value, "__func__", value)  # class and static methods
    if not callable(value) or getattr(value, "__module__", module.__name__) is None:
        return
    doc = inspect.getdoc(value) if "__doc__" in dir(value) else None
    summary = (doc or "").strip().partition("\n")[0].strip()
    # A signature is no summary, and a line cut in the middle teaches nothing.
    if not 15 <= len(summary) <= 160 or summary[-1] not in ".!?" or summary.startswith(name):
        return
    yield DocstringPair(module.__name__, name, _signature(value), summary)


def _signature(value: Any) -> str:
    try:
        text = str(inspect.signature(value))
    except (TypeError, ValueError):
        return "()"
    # Addresses in default values differ from run to run.
    return text if len(text) <= 160 and " at 0x" not in text else "(…)"
