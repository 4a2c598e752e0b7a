"""A run's directory: one process at a time, one recipe, finished stages are not repeated, a kill loses nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from compressor import run_directory
from compressor.errors import CheckpointError, CompressorError, RequestError, RunLockedError
from compressor.run_directory import RunDirectory, fingerprint

RECIPE = {"methods": [{"name": "toy", "config": {"keep": 0.5, "part": {"lr": 0.1}}}], "targets": ["a"], "seed": 0}


def create(path: Path, **changes: object) -> RunDirectory:
    return RunDirectory.create(path, RECIPE | changes)


def test_create_writes_the_recipe_and_the_state(tmp_path: Path) -> None:
    with create(tmp_path / "a" / "run") as run:
        assert run.recipe == RECIPE
    state = json.loads((tmp_path / "a" / "run" / "run.json").read_text())
    assert state["schema"] == 1
    assert {"compressor", "python"} <= set(state["versions"])
    assert state["stages"] == {}


def test_a_finished_stage_is_not_done_again_while_its_fingerprint_holds(tmp_path: Path) -> None:
    with create(tmp_path) as run, run.stage("train", "x") as stage:
        assert not stage.finished
        stage.facts["steps"] = 3
    with create(tmp_path) as run:
        assert run.done("train", "x")
        with run.stage("train", "x") as stage:
            assert stage.finished
            assert stage.facts == {"steps": 3}
        with run.stage("train", "y") as stage:
            assert not stage.finished
        assert not run.done("train", "x")
        assert run.stages["train"]["seconds"] >= 0


@pytest.mark.parametrize(
    ("error", "state"), [(ValueError("two\nlines"), "failed"), (KeyboardInterrupt(), "interrupted")]
)
def test_a_stage_that_fails_is_remembered_as_such(tmp_path: Path, error: BaseException, state: str) -> None:
    with create(tmp_path) as run:
        with pytest.raises(type(error)), run.stage("train", "x"):
            raise error
        assert run.stages["train"]["state"] == state
        assert "\n" not in run.stages["train"]["error"]
        assert not run.done("train", "x")


def test_a_stage_that_was_killed_is_done_again(tmp_path: Path) -> None:
    code = f"""
    import os, signal
    from compressor.run_directory import RunDirectory
    run = RunDirectory.create({str(tmp_path)!r}, {RECIPE!r})
    with run.stage("first", "x"): pass
    with run.stage("second", "x"): os.kill(os.getpid(), signal.SIGKILL)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)])
    assert done.returncode == -signal.SIGKILL
    with create(tmp_path) as run:
        assert run.done("first", "x")
        assert run.stages["second"]["state"] == "running"
        assert not run.done("second", "x")


def test_a_second_run_in_the_same_directory_is_refused_and_told_who_holds_it(tmp_path: Path) -> None:
    with create(tmp_path):
        with pytest.raises(RunLockedError, match=f"another run works in .*process {os.getpid()} on "):
            create(tmp_path)
        with pytest.raises(RunLockedError):
            RunDirectory.existing(tmp_path)
    create(tmp_path).close()


def test_another_recipe_is_refused_with_the_first_key_that_differs(tmp_path: Path) -> None:
    create(tmp_path).close()
    with pytest.raises(RequestError, match="another recipe: seed was 0, now 1; .*--overwrite"):
        create(tmp_path, seed=1)
    changed = [{"name": "toy", "config": {"keep": 0.5, "part": {"lr": 0.2}}}]
    with pytest.raises(RequestError, match=r"methods\.0\.config\.part\.lr was 0\.1, now 0\.2"):
        create(tmp_path, methods=changed)
    with pytest.raises(RequestError, match="judge was null, now"):
        create(tmp_path, judge="run:x")
    assert RunDirectory.existing(tmp_path).recipe == RECIPE


def test_keys_that_do_not_change_the_student_may_differ(tmp_path: Path) -> None:
    create(tmp_path, device="cpu").close()
    with create(tmp_path, device="cuda", checkpoint_seconds=5.0, targets=["a", "b"]) as run:
        assert (run.recipe["device"], run.recipe["targets"]) == ("cuda", ["a", "b"])


def test_overwrite_removes_the_old_run(tmp_path: Path) -> None:
    with create(tmp_path) as run, run.stage("train", "x"):
        run.student.mkdir()
        (run.student / "model").write_text("old")
    with RunDirectory.create(tmp_path, RECIPE | {"seed": 1}, overwrite=True) as run:
        assert run.stages == {}
        assert not run.student.exists()
        assert run.recipe["seed"] == 1


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_directory_of_other_files_is_refused_and_left_alone(tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(RequestError, match=r"is not empty and holds no run \(it has thesis.tex\)"):
        RunDirectory.create(tmp_path, RECIPE, overwrite=overwrite)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_a_run_killed_before_its_recipe_was_written_goes_on(tmp_path: Path) -> None:
    create(tmp_path).close()
    (tmp_path / "recipe.yaml").unlink()
    with create(tmp_path, seed=5) as run:
        assert run.recipe["seed"] == 5


def test_damaged_state_is_refused_and_kept(tmp_path: Path) -> None:
    create(tmp_path).close()
    for content in ('{"schema": 1, "sta', "[]", '{"schema": 99, "stages": {}}'):
        (tmp_path / "run.json").write_text(content)
        with pytest.raises(CheckpointError, match="run.json is damaged"):
            create(tmp_path)
        assert (tmp_path / "run.json").read_text() == content
    RunDirectory.create(tmp_path, RECIPE, overwrite=True).close()


def test_existing_refuses_what_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="holds no run"):
        RunDirectory.existing(tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()


def test_a_path_that_cannot_be_a_directory_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RequestError, match="is a file: --out must name a directory"):
        create(tmp_path / "file")
    with pytest.raises(CompressorError, match="cannot use .* as the run's directory: Not a directory"):
        create(tmp_path / "file" / "below")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_one_line_and_leaves_the_old_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, value: object) -> None:
        try:
            with open("/dev/full", "w") as file:
                file.write("x")
        except OSError as error:
            raise CompressorError(f"cannot write {path}: {error.strerror}") from error

    with create(tmp_path) as run:
        before = (tmp_path / "run.json").read_bytes()
        monkeypatch.setattr(run_directory, "write_json", full)
        with pytest.raises(CompressorError, match=r"cannot write .*run\.json: No space left on device"):
            run.mark("train", "done")
        assert (tmp_path / "run.json").read_bytes() == before


def test_processes_that_do_not_lead_read_but_never_write(tmp_path: Path) -> None:
    follower = RunDirectory.create(tmp_path, RECIPE, leads=False)
    assert list(tmp_path.iterdir()) == []
    with create(tmp_path) as leader:
        with leader.stage("train", "x"):
            pass
        assert follower.done("train", "x")
        follower.mark("train", "failed")
        assert leader.done("train", "x")


def test_fingerprint_is_that_of_the_values_not_of_their_order() -> None:
    assert fingerprint({"a": 1, "b": [2]}, "x") == fingerprint({"b": [2], "a": 1}, "x")
    assert fingerprint({"a": 1}) != fingerprint({"a": 2})
