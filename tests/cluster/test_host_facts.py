"""The facts that a host reports: hashes of files, network interfaces, and the script that is sent to other hosts."""

from __future__ import annotations

import subprocess
import sys

from hosts import need_programs

from hynb.cluster import FactsRequest, host_facts


def test_a_change_at_the_end_of_a_large_file_changes_its_hash(tmp_path, monkeypatch):
    path = tmp_path / "a"
    path.write_bytes(bytes(range(256)) * 40_000)
    whole = host_facts.file_hash(path)
    monkeypatch.setattr(host_facts, "WHOLE_BYTES", 1000)
    sampled = host_facts.file_hash(path)
    with path.open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"x")
    assert sampled != whole and host_facts.file_hash(path) != sampled


def test_what_does_not_exist_has_no_hash(tmp_path):
    assert host_facts.file_hash(tmp_path / "none") is None
    assert host_facts.folder_hash(tmp_path) is None
    assert host_facts.code_hash(tmp_path / "none") is None


def test_the_hash_of_code_covers_modules_and_stubs(tmp_path):
    hashes = [host_facts.code_hash(tmp_path)]
    for name in ("a.py", "__init__.pyi"):
        (tmp_path / name).write_text("x = 1\n")
        hashes.append(host_facts.code_hash(tmp_path))
    (tmp_path / "a.pyc").write_text("")
    assert len(set(hashes)) == 3 and host_facts.code_hash(tmp_path) == hashes[-1]


def test_the_script_needs_the_standard_library_alone(tmp_path):
    """Run as on another host: from standard input, by an interpreter without site-packages and in another folder."""
    data = tmp_path / "it's $(touch data).jsonl"
    data.write_text("{}\n")
    request: FactsRequest = {
        "packages": ["torch"],
        "code": str(tmp_path),
        "output_dir": str(tmp_path / "runs" / "first"),
        "model": None,
        "data": [str(data), str(tmp_path / "none")],
        "token": str(data),
        "addresses": ["127.0.0.1"],
        "connect": {},
        "login": {"beta": ["false"], "gamma": ["no-such-program"]},
    }
    done = subprocess.run(
        [sys.executable, "-S", "-"],
        input=host_facts.script_for(request),
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=True,
    )
    facts = host_facts.parse_output("welcome\n" + done.stdout)
    assert facts is not None
    assert facts["versions"] == {"torch": "not installed"}
    assert facts["data"] == {str(data): host_facts.file_hash(data), str(tmp_path / "none"): None}
    assert facts["sees_token"] and facts["routes"] == {"127.0.0.1": "127.0.0.1"}
    assert facts["output_disk"]["folder"] == str(tmp_path) and facts["output_disk"]["writable"]
    assert facts["logins"]["beta"] == "refused" and "no-such-program" in facts["logins"]["gamma"]
    assert [path.name for path in tmp_path.iterdir()] == [data.name]
    assert host_facts.parse_output("welcome\n") is None


def test_interfaces_are_the_same_with_and_without_ip():
    need_programs("ip")
    found = host_facts.interfaces_of_kernel()
    assert "127.0.0.1" in found["lo"] and set(found) == set(host_facts.interfaces())
