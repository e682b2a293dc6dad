"""Ids are all different, of one shape, and sort by time."""

from __future__ import annotations

import os
import re
from concurrent.futures import ThreadPoolExecutor

from tensafe_server.ids import new_id


def test_ids_differ_and_have_one_shape_from_whatever_thread():
    with ThreadPoolExecutor(4) as threads:
        ids = list(threads.map(lambda _: new_id("op"), range(10_000)))
    assert len({found[-19:] for found in ids}) == 10_000
    assert all(re.fullmatch("op-[0-9a-f]{30}", found) for found in ids)


def test_an_id_sorts_behind_one_of_an_earlier_millisecond(monkeypatch):
    monkeypatch.setattr("tensafe_server.ids.time.time_ns", lambda: 1_700_000_000_000_000_000)
    before = new_id("op")
    monkeypatch.setattr("tensafe_server.ids.time.time_ns", lambda: 1_700_000_000_001_000_000)
    assert before < new_id("op")


def test_a_forked_process_draws_its_own():
    new_id("op")
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(write, new_id("op").encode())
        os._exit(0)
    os.waitpid(child, 0)
    theirs = os.read(read, 64).decode()
    os.close(read)
    os.close(write)
    assert new_id("op")[-19:] != theirs[-19:]
