"""The log of a rank on a host with a disk of its own, which its guard copies, also where the rank begins it anew."""

from __future__ import annotations

from types import SimpleNamespace

from hynb.supervision.logs import append_to_log
from hynb.supervision.node_guard import Guard


def test_a_log_that_begins_anew_is_copied_whole(tmp_path):
    sent: list[str] = []
    guard = Guard.__new__(Guard)
    guard._offsets = {}
    guard._session = SimpleNamespace(is_ahead=False, send=lambda message: sent.append(message["data"]))
    log = tmp_path / "20260101000000_rank1.log"
    log.write_text("one\ntwo\n")
    assert guard._send_new(log, whole=False)
    with log.open("a") as file:
        file.write("three\nfour\n")
    log.replace(log.with_name(f"{log.name}.1"))
    log.write_text("five\n")
    assert guard._send_new(log, whole=False)
    with log.open("a") as file:
        file.write("six\n")
    assert guard._send_new(log, whole=False)
    assert "".join(sent) == "one\ntwo\nthree\nfour\nfive\nsix\n"


def test_the_copy_of_a_log_begins_anew_at_the_end_of_a_line(tmp_path):
    log, kept = tmp_path / "20260101000000_rank1.log", tmp_path / "20260101000000_rank1.log.1"
    for part in (b"one\ntwo\n", b"three\nfo", b"ur\n", b"five\n"):
        append_to_log(log, part, limit_bytes=12)
    assert kept.read_bytes() == b"one\ntwo\nthree\nfour\n" and log.read_bytes() == b"five\n"
    append_to_log(log, b"six and seven\n", limit_bytes=12)
    assert kept.read_bytes() == b"five\nsix and seven\n" and log.read_bytes() == b""
