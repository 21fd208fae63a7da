"""Hosts and slots: both forms, every mistake by its line, round trips, filters."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hynb.cluster import Host
from hynb.cluster.hostfile import local, parse, read, select, ssh_config_of, to_text, write
from hynb.errors import ClusterError

names = st.from_regex(r"[a-z0-9]([a-z0-9.-]{0,20}[a-z0-9])?", fullmatch=True) | st.ip_addresses().map(str)


@given(st.dictionaries(names, st.integers(1, 128), min_size=1, max_size=12))
def test_round_trip(hosts):
    listed = [Host(name=name, slots=slots) for name, slots in hosts.items()]
    assert parse(to_text(listed)) == listed


@given(st.dictionaries(names, st.integers(1, 128), min_size=1, max_size=12))
def test_the_list_of_upstreams_training_guide_is_read_too(hosts):
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
    text += "fe80::1%$(touch${IFS}x) slots=2\n"
    with pytest.raises(ClusterError) as caught:
        parse(text, source="hosts")
    problems = caught.value.problems
    assert [line.split(":")[1] for line in problems] == ["2", "3", "4", "5", "6", "7", "8", "9"]
    assert "b slots=8" in problems[0] and "listed twice" in problems[2] and "IPv6" in problems[6]
    assert "not a network interface" in problems[7]


@pytest.mark.parametrize("text", ["", "# nothing\n", "\n\n"])
def test_a_file_without_hosts_is_refused(text):
    with pytest.raises(ClusterError, match="names no host"):
        parse(text)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ClusterError, match="cannot be read"):
        read(tmp_path / "no")


HOSTS = [Host(name="a", slots=12), Host(name="b-1.lab", slots=2), Host(name="fd00::7", slots=4)]


@pytest.mark.parametrize(
    ("include", "exclude", "left"),
    [
        (None, None, {"a": None, "b-1.lab": None, "fd00::7": None}),
        ("a", None, {"a": None}),
        ("b-1.lab:1@a:0,11", None, {"a": (0, 11), "b-1.lab": (1,)}),
        ("[fd00::7]:0,3@a", None, {"a": None, "fd00::7": (0, 3)}),
        (None, "a@b-1.lab:0", {"b-1.lab": (1,), "fd00::7": None}),
        ("a:0@a:1", None, {"a": (0, 1)}),
        ("b-1.lab:0,1", None, {"b-1.lab": None}),
    ],
)
def test_hosts_and_slots_are_included_and_excluded(include, exclude, left):
    found = select(HOSTS, include=include, exclude=exclude)
    assert {host.name: host.slot_ids for host in found} == left
    for host in found:
        assert host.slots == (len(host.slot_ids) if host.slot_ids else {h.name: h.slots for h in HOSTS}[host.name])


@given(st.sets(st.tuples(st.sampled_from(["a", "b-1.lab", "fd00::7"]), st.integers(0, 1)), min_size=1))
def test_include_and_exclude_are_complements(selected):
    text = "@".join(f"[{name}]:{slot}" if ":" in name else f"{name}:{slot}" for name, slot in sorted(selected))

    def slots(hosts):
        return {(host.name, slot) for host in hosts for slot in (host.slot_ids or range(host.slots))}

    assert slots(select(HOSTS, include=text)) == selected
    assert slots(select(HOSTS, exclude=text)) == slots(HOSTS) - selected


def test_every_wrong_part_of_a_filter_is_named():
    with pytest.raises(ClusterError) as caught:
        select(HOSTS, include="c@a:12@b-1.lab:x@fd00::7")
    problems = caught.value.problems
    assert len(problems) == 4 and "slots 0 to 11, not 12" in problems[1]
    assert "no host is named c; there are a, b-1.lab" in problems[0]
    with pytest.raises(ClusterError, match="no slot of any host is left"):
        select(HOSTS[:1], exclude="a")
    with pytest.raises(ClusterError, match="give only one of the two"):
        select(HOSTS, include="a", exclude="a")


def test_the_ssh_config_beside_a_hostfile(tmp_path):
    assert ssh_config_of(tmp_path / "hostfile") is None
    (tmp_path / "ssh_config").write_text("")
    assert ssh_config_of(tmp_path / "hostfile") == tmp_path / "ssh_config"
