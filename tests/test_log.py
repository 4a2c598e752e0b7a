"""The log: every event is a line of JSON, whatever happens."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from compressor.errors import CompressorError
from compressor.log import Log, read_log


def test_events_are_appended_and_messages_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        log = Log()
        log.attach(tmp_path / "log.jsonl")
        log.event("train", step=1, loss=np.float32(0.5), bad=float("nan"), place=tmp_path)
        log.say("[bold]done[/bold]")
        log.close()
    events = read_log(tmp_path / "log.jsonl")
    assert [event["kind"] for event in events] == ["train", "message"] * 2
    assert events[0]["loss"] == 0.5
    assert events[0]["bad"] is None
    assert capsys.readouterr().out == "[bold]done[/bold]\n" * 2


def test_a_line_that_a_kill_cut_short_spoils_no_other(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text('{"kind": "a"}\n{"kind": "b", "st')
    log = Log(quiet=True)
    log.attach(path)
    log.event("c")
    log.close()
    assert [event["kind"] for event in read_log(path)] == ["a", "c"]


def test_a_quiet_log_prints_nothing_but_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = Log(quiet=True)
    log.attach(tmp_path / "log.jsonl")
    log.warn("careful")
    log.close()
    assert capsys.readouterr().out == ""
    assert read_log(tmp_path / "log.jsonl")[0]["message"] == "warning: careful"


def test_only_the_first_process_of_a_launch_speaks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    log = Log()
    log.attach(tmp_path / "log.jsonl")
    log.say("hello")
    assert capsys.readouterr().out == ""
    assert not (tmp_path / "log.jsonl").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_one_line() -> None:
    log = Log(quiet=True)
    log.attach(Path("/dev/full"))
    with pytest.raises(CompressorError, match="cannot write /dev/full: No space left on device"):
        log.event("train")


def test_no_file_is_no_events(tmp_path: Path) -> None:
    assert read_log(tmp_path / "none.jsonl") == []
