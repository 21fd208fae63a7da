"""Tables of this machine, and its hostfile."""

from __future__ import annotations

import pytest

from hynb.errors import ClusterError, ConfigError
from hynb.widgets import machine_table, versions_table
from hynb.widgets.machine import write_local_hostfile


def test_the_tables_show_the_machine_and_the_versions(tmp_path):
    names = [name for name, _ in machine_table(tmp_path).rows]
    assert names[0] == "host" and names[-3:] == ["CPU cores", "memory", "disk"]
    assert str(tmp_path) in dict(machine_table(tmp_path).rows)["disk"]
    assert {"python", "torch", "transformers", "deepspeed"} <= {name for name, _ in versions_table().rows}


def test_a_hostfile_is_written_once_and_other_content_is_kept(tmp_path):
    path = tmp_path / "my" / "hostfile"
    for _ in range(2):
        assert write_local_hostfile(path, slots=3).rows == [(str(path), "localhost slots=3")]
    assert path.read_text() == "localhost slots=3\n"
    with pytest.raises(ClusterError, match=r"exists already and does not contain 'localhost slots=4'"):
        write_local_hostfile(path, slots=4)
    write_local_hostfile(path, slots=4, overwrite=True)
    assert path.read_text() == "localhost slots=4\n"


@pytest.mark.parametrize("slots", [0, "two", 1.5])
def test_slots_that_are_not_a_number_of_ranks_are_refused(tmp_path, slots):
    with pytest.raises(ConfigError, match="must be a whole number ≥ 1"):
        write_local_hostfile(tmp_path / "hostfile", slots=slots)
