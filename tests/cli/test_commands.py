"""The commands: what they print for people and for programs, and how they refuse."""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from compressor.cli.app import execute
from compressor.errors import CheckpointError, DivergedError
from compressor.log import Log
from compressor.recipe import Recipe

Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Cli:
    """Run a command line; its exit code, standard output and standard error."""

    def run(*arguments: str) -> tuple[int, str, str]:
        code = execute(arguments)
        out, err = capsys.readouterr()
        return code, out, err

    return run


class FakePipeline(types.ModuleType):
    """Records how it is called."""

    def __init__(self) -> None:
        super().__init__("compressor.pipeline")
        self.calls: list[tuple[Any, ...]] = []
        self.failure: BaseException | None = None

    def plan(self, recipe: Recipe) -> list[str]:
        return ["train 0-toy", "export ort-fp32", "report"]

    def run(self, recipe: Recipe, directory: Path, *, overwrite: bool, log: Log) -> Path:
        self.calls.append((recipe, directory, overwrite))
        log.say("working")
        if self.failure is not None:
            raise self.failure
        return directory / "report" / "report.html"

    def export_run(self, run: Path, targets: Sequence[str], settings: dict[str, object], log: Log) -> list[Path]:
        self.calls.append((run, targets, settings))
        return [run / "artifacts" / target for target in targets]

    def report_run(self, run: Path) -> Path:
        return run / "report" / "report.html"


@pytest.fixture
def pipeline(monkeypatch: pytest.MonkeyPatch) -> FakePipeline:
    """The heavy work replaced: these tests are about the shell around it."""
    import compressor

    fake = FakePipeline()
    monkeypatch.setitem(sys.modules, "compressor.pipeline", fake)
    monkeypatch.setattr(compressor, "pipeline", fake, raising=False)
    return fake


# --- what there is ---------------------------------------------------------------------------------------------------


def test_methods_lists_the_catalogue(cli: Cli, toy_methods: None) -> None:
    code, out, _ = cli("methods")
    assert code == 0
    assert "ppcl" in out
    assert "Do nothing, well." in out
    code, out, _ = cli("methods", "--json")
    listed = {one["name"]: one for one in json.loads(out)["methods"]}
    assert listed["ppcl"]["venue"] == "CVPR 2026"
    assert listed["toy"]["title"] == "A Toy"


def test_methods_with_a_name_shows_paper_needs_and_every_key_with_its_default(cli: Cli, toy_methods: None) -> None:
    code, out, _ = cli("methods", "toy")
    assert code == 0
    for part in (
        "A Toy",
        "https://example.org/toy",
        "Exported: nothing",
        "part.steps",
        "Steps of this part.",
        "demo:x",
    ):
        assert part in out
    code, out, _ = cli("--json", "methods", "toy")
    shown = json.loads(out)
    keys = {row["key"]: row for row in shown["config"]}
    assert keys["keep"] == {"key": "keep", "type": "float", "default": 0.25, "help": "Share that stays."}
    assert keys["part.lr"]["default"] == 0.5
    assert keys["mode"]["type"] == '"fast" | "slow"'
    assert shown["needs"]["teachers"] == "teacher (one)"


def test_methods_shows_keys_that_must_be_given(cli: Cli, toy_methods: None) -> None:
    code, out, _ = cli("methods", "toy-own")
    assert code == 0
    assert "(to be given)" in out


def test_methods_shows_ppcl(cli: Cli) -> None:
    code, out, _ = cli("methods", "ppcl")
    assert code == 0
    for part in ("Pluggable Pruning", "keep", "finetune.steps", "demo:digits-mmdit"):
        assert part in out


def test_recipe_prints_yaml_that_resolves_to_the_default(cli: Cli, tmp_path: Path) -> None:
    code, out, _ = cli("recipe", "ppcl")
    assert code == 0
    assert "# Share of the teacher's block parameters" in out
    (tmp_path / "recipe.yaml").write_text(out)
    assert Recipe.from_yaml(tmp_path / "recipe.yaml").resolve() == Recipe(methods=["ppcl"]).resolve()
    code, out, _ = cli("recipe", "ppcl", "--json")
    assert json.loads(out)["methods"][0]["name"] == "ppcl"


def test_targets_say_what_can_be_built_and_run_here(cli: Cli) -> None:
    code, out, _ = cli("targets")
    assert code == 0
    assert "trt-fp16" in out
    rows = {row["name"]: row for row in json.loads(cli("targets", "--json")[1])["targets"]}
    assert rows["ort-fp32"]["can_build"]
    for row in rows.values():
        assert row["can_run"] or row["reason"], "what cannot run must say why"


def test_doctor_finds_what_loads_and_how_to_install_the_rest(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    from compressor.cli import doctor

    probes = (
        doctor.Probe("numpy", ("not_there", "numpy"), "arrays", "train", "['cpu', m.__name__]"),
        doctor.Probe("absent", ("absent_package",), "nothing", "ort"),
        doctor.Probe("crashing", ("this",), "nothing", "ort", "__import__('os')._exit(7)"),
        doctor.Probe("raising", ("this",), "nothing", "ort", "1/0"),
    )
    monkeypatch.setattr(doctor, "PROBES", probes)
    code, out, _ = cli("doctor", "--json")
    assert code == 0
    numpy, absent, crashing, raising = json.loads(out)["libraries"]
    assert numpy["loads"]
    assert numpy["devices"] == ["cpu", "numpy"]
    assert (absent["problem"], absent["install"]) == ("not installed", "pip install 'compressor[ort]'")
    assert crashing["problem"] == "does not load: ended with code 7"
    assert "ZeroDivisionError" in raising["problem"]
    code, out, _ = cli("doctor")
    assert code == 0
    assert "compressor[ort]" in out


def test_version_and_bare_command(cli: Cli) -> None:
    from compressor import __version__

    assert cli("--version")[:2] == (0, f"compressor {__version__}\n")
    code, out, _ = cli()
    assert code == 0
    assert "doctor" in out


# --- run -------------------------------------------------------------------------------------------------------------


def test_run_hands_the_resolved_recipe_to_the_pipeline(cli: Cli, toy_methods: None, pipeline: FakePipeline) -> None:
    code, out, _ = cli(
        "run", "--method", "toy", "--target", "ort-fp32", "--set", "keep=0.75", "--out", "o", "--overwrite"
    )
    assert code == 0
    assert "working" in out
    recipe, directory, overwrite = pipeline.calls[0]
    assert recipe == Recipe.parse({"methods": [{"name": "toy", "config": {"keep": 0.75}}]}).resolve()
    assert (directory, overwrite) == (Path("o"), True)


def test_run_takes_its_directory_from_the_recipe(cli: Cli, toy_methods: None, pipeline: FakePipeline) -> None:
    cli("run", "--method", "toy")
    assert pipeline.calls[0][1] == Path("runs/toy-digits")


def test_run_with_a_file_and_with_flags_is_the_same(
    cli: Cli, toy_methods: None, pipeline: FakePipeline, tmp_path: Path
) -> None:
    arguments = ["--method", "toy", "-t", "trt-fp16", "-s", "part.steps=3", "--seed", "4", "--teacher", "run:x"]
    cli("run", *arguments)
    pipeline.calls[0][0].to_yaml(tmp_path / "r.yaml")
    cli("run", "--recipe", str(tmp_path / "r.yaml"))
    assert pipeline.calls[0][:2] == pipeline.calls[1][:2]


def test_run_json_prints_one_document(cli: Cli, toy_methods: None, pipeline: FakePipeline) -> None:
    code, out, _ = cli("run", "--method", "toy", "--json", "--out", "o")
    assert code == 0
    assert json.loads(out) == {"run": "o", "report": "o/report/report.html"}


def test_dry_run_prints_the_plan_and_does_nothing(
    cli: Cli, toy_methods: None, pipeline: FakePipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["run", "--method", "toy", "--target", "trt-fp16", "--target", "ort-fp32", "--dry-run"]
    code, out, _ = cli(*arguments)
    assert code == 0
    for part in ("keep: 0.25", "1. train 0-toy", "trt-fp16", "runs/toy-digits"):
        assert part in out
    value = json.loads(cli(*arguments, "--json")[1])
    assert [row["name"] for row in value["targets"]] == ["trt-fp16", "ort-fp32"]
    assert Recipe.parse(value["recipe"]).resolve() == Recipe.parse(value["recipe"])
    assert pipeline.calls == []
    assert list(tmp_path.glob("runs*")) == []


def test_interrupted_run_says_how_to_go_on(cli: Cli, toy_methods: None, pipeline: FakePipeline) -> None:
    pipeline.failure = KeyboardInterrupt()
    code, _, err = cli("run", "--method", "toy", "--out", "o")
    assert code == 130
    assert err == "interrupted: what is done is kept in o; the same command goes on\n"


def test_processes_behind_the_first_print_nothing(
    cli: Cli, toy_methods: None, pipeline: FakePipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    assert cli("run", "--method", "toy", "--json") == (0, "", "")
    assert cli("run", "--method", "toy", "--dry-run") == (0, "", "")
    assert cli("run", "--method", "tooy") == (2, "", "")
    pipeline.failure = DivergedError("the loss is not finite")
    assert cli("run", "--method", "toy")[2] == "error (process 1): the loss is not finite\n"


# --- steps -----------------------------------------------------------------------------------------------------------


def test_export_hands_targets_and_settings_over(cli: Cli, pipeline: FakePipeline) -> None:
    code, out, _ = cli("export", "r", "--target", "trt-fp16", "--set", "keep=0.5", "--set", "active=[1, 4]")
    assert (code, out) == (0, "r/artifacts/trt-fp16\n")
    assert pipeline.calls == [(Path("r"), ["trt-fp16"], {"keep": 0.5, "active": [1, 4]})]
    assert json.loads(cli("export", "r", "-t", "a", "--json")[1]) == {"artifacts": ["r/artifacts/a"]}


def test_report_prints_the_path(cli: Cli, pipeline: FakePipeline) -> None:
    assert cli("report", "r") == (0, "r/report/report.html\n", "")


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "--method", "pcl"], "error: unknown method 'pcl': did you mean ppcl?\n"),
        (["methods", "pcl"], "error: unknown method 'pcl': did you mean ppcl?\n"),
        (["recipe", "pcl"], "error: unknown method 'pcl': did you mean ppcl?\n"),
        (["run", "--method", "ppcl", "--target", "trt-fp61"], "error: no target 'trt-fp61': did you mean trt-fp16"),
        (["run", "--method", "ppcl", "--set", "kep=1"], "error: --set kep=1: unknown key 'kep': did you mean keep?\n"),
        (["run"], "error: no method is given"),
        (["run", "--seed", "x"], "error: Invalid value for '--seed'"),
        (["run", "--methd", "ppcl"], "error: No such option: --methd"),
        (["metods"], "error: No such command 'metods'."),
        (["run", "--recipe", "none.yaml"], "error: cannot read the recipe none.yaml: No such file or directory\n"),
    ],
)
def test_a_wrong_request_is_one_line_and_exit_code_2(cli: Cli, arguments: list[str], message: str) -> None:
    code, out, err = cli(*arguments)
    assert code == 2
    assert out == ""
    assert err.startswith(message)
    assert err.count("\n") == 1


def test_a_failed_run_is_one_line_and_exit_code_1(cli: Cli, toy_methods: None, pipeline: FakePipeline) -> None:
    pipeline.failure = CheckpointError("the checkpoint [bold]x[/bold]\n is damaged")
    assert cli("run", "--method", "toy")[::2] == (1, "error: the checkpoint [bold]x[/bold] is damaged\n")


def test_an_unexpected_error_names_its_type_and_debug_gives_the_traceback(
    cli: Cli, toy_methods: None, pipeline: FakePipeline
) -> None:
    pipeline.failure = ZeroDivisionError("oops")
    code, _, err = cli("run", "--method", "toy")
    assert (code, err.count("\n")) == (1, 1)
    assert err == "error: unexpected ZeroDivisionError: oops (run again with --debug for the traceback)\n"
    for arguments in (["--debug", "run", "--method", "toy"], ["run", "--method", "toy", "--debug"]):
        assert "Traceback" in cli(*arguments)[2]


def test_a_missing_package_names_the_extra(cli: Cli, toy_methods: None, pipeline: FakePipeline) -> None:
    pipeline.failure = ModuleNotFoundError("No module named 'torch'", name="torch")
    code, _, err = cli("run", "--method", "toy")
    assert (code, err) == (1, "error: this needs the package 'torch': pip install 'compressor[train]'\n")


def test_errors_are_json_too(cli: Cli) -> None:
    code, out, err = cli("run", "--method", "pcl", "--json")
    assert (code, out) == (2, "")
    assert json.loads(err) == {
        "error": "unknown method 'pcl': did you mean ppcl?", "type": "RequestError", "exit_code": 2,
    }  # fmt: skip


def test_explained_recipe_is_plain_yaml(cli: Cli) -> None:
    out = cli("recipe", "ppcl")[1]
    assert yaml.safe_load(out)["data"] == {"train": "digits"}
