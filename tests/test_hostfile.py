"""Hosts and slots: both forms, every mistake by its line, what was written read back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hynb.errors import ClusterError
from hynb.hostfile import Host, local, parse, read, to_text, write

names = st.from_regex(r"[a-z0-9]([a-z0-9.-]{0,20}[a-z0-9])?", fullmatch=True) | st.ip_addresses().map(str)


@given(st.dictionaries(names, st.integers(1, 128), min_size=1, max_size=12))
def test_what_was_written_is_read_back(hosts):
    listed = [Host(name=name, slots=slots) for name, slots in hosts.items()]
    assert parse(to_text(listed)) == listed


@given(st.dictionaries(names, st.integers(1, 128), min_size=1, max_size=12))
def test_the_guides_list_is_read_too(hosts):
    text = ",".join(f"[{name}]:{slots}" if ":" in name else f"{name}:{slots}" for name, slots in hosts.items())
    assert {host.name: host.slots for host in parse(text)} == hosts


def test_comments_blank_lines_and_many_slots(tmp_path):
    text = "# two machines\n\n10.0.0.1 slots=16  # the first\nnode-2.lab slots=8\n"
    write(tmp_path / "deep" / "hostfile", parse(text))
    assert read(tmp_path / "deep" / "hostfile") == [
        Host(name="10.0.0.1", slots=16),
        Host(name="node-2.lab", slots=8),
    ]
    assert to_text(local(2)) == "localhost slots=2\n"


def test_all_mistakes_are_named_by_line():
    text = "a slots=8\nb\nc slots=0\na slots=4\nd slots=x\nbad name slots=2\n-x slots=2\n1::zz slots=2\n"
    with pytest.raises(ClusterError) as caught:
        parse(text, source="hosts")
    said = str(caught.value).splitlines()
    assert [line.split(":")[1] for line in said] == ["2", "3", "4", "5", "6", "7", "8"]
    assert "b slots=8" in said[0] and "listed twice" in said[2] and "IPv6" in said[6]


@pytest.mark.parametrize("text", ["", "# nothing\n", "\n\n"])
def test_a_file_without_hosts_is_refused(text):
    with pytest.raises(ClusterError, match="names no host"):
        parse(text)


def test_an_absent_file_is_named(tmp_path):
    with pytest.raises(ClusterError, match="cannot be read"):
        read(tmp_path / "no")
