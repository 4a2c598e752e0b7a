"""The report: its schema, its verdict, and its two renderings."""

import base64
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from compressor.errors import ArtifactError, RequestError
from compressor.profiles import report_facts as facts
from compressor.profiles.latency import Latency, summarise
from compressor.profiles.machine import describe_machine
from compressor.profiles.report import (
    Comparison,
    CurvePoint,
    EngineEntry,
    MetricInfo,
    ModelEntry,
    Parity,
    Report,
    SampleSheet,
    TaskInfo,
    load_report,
)
from compressor.profiles.report_html import render_html
from compressor.profiles.report_markdown import render_markdown
from compressor.profiles.report_numbers import (
    format_bytes,
    format_count,
    format_difference,
    format_metric,
    format_number,
)

PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
ACCURACY = MetricInfo(name="accuracy", label="top-1 accuracy", better="higher", unit="%", headline=True)
DISTANCE = MetricInfo(name="frechet_distance", label="Fréchet distance", better="lower", headline=True)
STD = MetricInfo(name="pixel_std", label="pixel std", better="higher")


def latency(milliseconds: float, drift: float = 0.0) -> Latency:
    generator = np.random.default_rng(int(milliseconds * 1000))
    rounds = [milliseconds * (1 + drift * number) * generator.uniform(1, 1.05, 20) for number in range(10)]
    return summarise(rounds, warmup=5)


def engine(model: str, target: str, milliseconds: float, accuracy: float, **changes) -> EngineEntry:
    values = {
        "runtime": "ONNX Runtime", "engine": "ONNX Runtime 1.32, CPU", "precision": target.rpartition("-")[2],
        "bytes": 4_000_000, "load_ms": 31.0, "first_ms": 9.0, "peak_memory_mb": 140.0,
        "parity": [Parity(graph="denoiser", output="sample", relative=2e-5, tolerance=1e-4)],
        "end_to_end": {"1": latency(milliseconds), "8": latency(5 * milliseconds)},
        "latency": {"denoiser": {"1": latency(milliseconds / 2)}},
        "metrics": {"accuracy": accuracy, "frechet_distance": 3.0, "pixel_std": 0.7},
    }  # fmt: skip
    return EngineEntry(model=model, target=target, **(values | changes))


def full_report() -> Report:
    return Report(
        title="ppcl on digits",
        created="2026-01-02T03:04:05+00:00",
        command="compress run --method ppcl --target ort-fp32",
        recipe={"methods": ["ppcl"], "seed": 0},
        machine=describe_machine(),
        task=TaskInfo(name="image generation", metrics=[ACCURACY, DISTANCE, STD]),
        models=[
            ModelEntry(
                name="teacher", parameters=5_000_000, block_parameters=4_000_000, bytes=20_000_000,
                metrics={"accuracy": 0.98, "frechet_distance": 2.0, "pixel_std": 0.7},
            ),
            ModelEntry(
                name="student", parameters=1_000_000, block_parameters=500_000, bytes=4_000_000,
                notes=["blocks 3 to 5 left"],
                metrics={"accuracy": 0.971, "frechet_distance": 1.5, "pixel_std": 0.7},
            ),
        ],
        engines=[
            engine("teacher", "ort-fp32", 40.0, 0.98, end_to_end={"1": latency(40.0, drift=0.1), "8": latency(200.0)}),
            engine("student", "ort-fp32", 10.0, 0.971),
            engine("student", "ort-int8", 6.0, 0.96),
            EngineEntry(
                model="student", target="trt-fp16", runnable=False, reason="this machine has no GPU", bytes=2_000_000
            ),
        ],
        comparisons=[
            Comparison(
                what="latency", a="teacher", b="student", ratio=4.1, low=3.9, high=4.3, target="ort-fp32", batch=1
            )
        ],
        curve=[
            CurvePoint(
                label=f"{n} blocks", model="student", parameters=n * 10**5, bytes=n * 4 * 10**5, latency_ms=float(n),
                metrics={"accuracy": 1 - 0.3 / n}, target="ort-fp32",
            )
            for n in (2, 4, 8)
        ],
        training={"depth": {"plug 0": [(step, 1 / (1 + step)) for step in range(400)], "empty": []}},
        samples=[SampleSheet(title="Student, 1 step", png_base64=PNG, caption="ten classes")],
        skipped=["energy: no sensor"],
        notes=["two norms stay in FP32"],
    )  # fmt: skip


@pytest.fixture(scope="module")
def report() -> Report:
    return full_report()


@pytest.fixture(scope="module")
def page(report) -> str:
    return render_html(report)


def test_a_saved_report_reads_back_as_it_was(report, tmp_path):
    path = report.save(tmp_path / "report")
    assert path == tmp_path / "report" / "report.html"
    assert sorted(file.name for file in path.parent.iterdir()) == ["report.html", "report.json", "report.md"]
    assert load_report(path.parent) == load_report(path.parent / "report.json") == report


def chain_report(speed: float) -> Report:
    """A dense few-step student and the sparse one after it, ``speed`` times as fast."""
    sizes = [("teacher", 4_000, 0.0, 20), ("0-few", 2_000, 0.001, 4), ("student", 2_000, 0.45, 4)]
    models = [
        ModelEntry(name=name, parameters=parameters, zeros=zeros, calls=calls, metrics={"accuracy": 0.9})
        for name, parameters, zeros, calls in sizes
    ]
    engines = [engine(name, "ort-fp32", 10.0, 0.9) for name, *_ in sizes]
    engines.append(engine("student", "trt-fp16", 1.0, 0.9, end_to_end={}, latency={}))
    pair = Comparison(
        what="latency", a="0-few", b="student", ratio=speed, low=speed - 0.01, high=speed + 0.01, target="ort-fp32",
        batch=1,
    )  # fmt: skip
    task = TaskInfo(name="image generation", metrics=[ACCURACY])
    ladder = [model.name for model in models]
    return Report(title="chain", task=task, models=models, engines=engines, ladder=ladder, comparisons=[pair])


def test_a_chain_is_a_ladder_with_a_row_for_every_model():
    table = facts.ladder_table(chain_report(1.0))
    heads = [column.heading for column in table.columns]
    assert heads == ["Model", "Parameters", "Zeros", "Weights", "Calls", "ort-fp32, ms", "Top-1 accuracy"]
    assert [row.cells[0] for row in table.rows] == ["teacher", "0-few", "student"]
    assert table.rows[2].cells[1:5] == ["2.00 k", "45.0 %", "–", "4"]
    assert facts.ladder_table(full_report()) is None


@pytest.mark.parametrize("speed, said", [(1.0, True), (0.9, True), (1.02, True), (1.3, False)])
def test_what_zeros_bought_follows_from_what_was_measured(speed, said):
    lines = facts.zeros_lines(chain_report(speed))
    assert lines[0].startswith(
        f"student, 45.0 % zeros, on ort-fp32: {format_number(speed)}× the speed of 0-few (rounds "
    )
    assert lines[0].endswith("file 4.00 MB → 4.00 MB.")
    assert lines[1:] == (["No engine that ran here computes these zeros faster."] if said else [])
    assert facts.zeros_lines(full_report()) == []


def test_of_several_teachers_the_best_is_what_the_student_is_held_against():
    metrics = [("teacher-1", 0.9), ("teacher-2", 0.95), ("teacher-3", None), ("student", 0.9)]
    models = [ModelEntry(name=name, metrics={"accuracy": value}) for name, value in metrics]
    report = Report(title="several", task=TaskInfo(name="x", metrics=[ACCURACY]), models=models)
    assert report.teacher.name == "teacher-2"


def test_the_schema_keeps_its_fields():
    written = json.loads(full_report().model_dump_json())
    assert written["schema_version"] == 1
    assert list(written) == [
        "schema_version", "title", "created", "command", "recipe", "machine", "task", "models", "ladder",
        "engines", "comparisons", "curve", "training", "samples", "skipped", "notes",
    ]  # fmt: skip
    assert set(written["engines"][0]["end_to_end"]["1"]) == {
        "samples_ms", "round_medians_ms", "mean", "p50", "p90", "p99", "min", "count", "warmup", "noisy", "reason",
    }  # fmt: skip


def test_nan_and_infinity_become_null_and_are_named_in_the_notes(tmp_path):
    report = full_report()
    report.models[1].metrics["frechet_distance"] = float("nan")
    report.training["depth"]["plug 0"][3] = (3, float("inf"))
    report.engines[2].metrics["accuracy"] = float("-inf")
    read = load_report(report.save(tmp_path).parent)
    assert read.models[1].metrics["frechet_distance"] is None
    assert read.training["depth"]["plug 0"][3] == (3, None)
    assert "models[student].metrics.frechet_distance" in read.notes[-1]
    assert "engines[2].metrics.accuracy" in read.notes[-1]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "is not JSON"),
        ("[]", "schema version None"),
        ('{"schema_version": 2, "title": "x"}', "schema version 2, this program reads 1"),
        ('{"schema_version": 1, "title": "x", "task": {"name": "t"}, "speed": 3}', "no valid report: speed"),
    ],
)
def test_a_damaged_report_is_a_one_line_error(tmp_path, text, said):
    (tmp_path / "report.json").write_text(text)
    with pytest.raises(ArtifactError, match=said) as caught:
        load_report(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_missing_report_is_an_error_of_the_request(tmp_path):
    with pytest.raises(RequestError, match="cannot read the report"):
        load_report(tmp_path / "none.json")


def test_a_sample_sheet_takes_nothing_but_a_png():
    for text in (base64.b64encode(b"<svg onload=x>").decode(), 'x" onerror="alert(1)'):
        with pytest.raises(ValueError, match="PNG in base64"):
            SampleSheet(title="x", png_base64=text)


def test_the_verdict_compares_the_student_with_the_teacher_on_the_fastest_engine_that_ran_both(report):
    result = facts.verdict(report)
    assert [fact.phrase for fact in result.facts] == [
        "5.00× fewer parameters", "4.10× faster on ort-fp32", "top-1 accuracy −0.9 points", "Fréchet distance −0.500",
    ]  # fmt: skip
    assert [fact.tone for fact in result.facts] == ["good", "good", "bad", "good"]
    assert "blocks 8.00×" in result.facts[0].detail and "rounds 3.90 to 4.30×" in result.facts[1].detail
    assert result.sentence.startswith("The student against the teacher: 5.00× fewer parameters, ")


def test_the_verdict_says_slower_when_the_student_is():
    report = full_report()
    report.comparisons.clear()
    report.engines[1] = engine("student", "ort-fp32", 80.0, 0.97)
    report.engines[2] = engine("student", "ort-int8", 90.0, 0.97)
    fact = facts.verdict(report).facts[1]
    assert re.fullmatch(r"1\.\d\d× slower on ort-fp32", fact.phrase) and fact.tone == "plain"


def test_the_verdict_stands_alone_when_there_is_no_teacher():
    report = full_report()
    del report.models[0], report.engines[0]
    result = facts.verdict(report)
    assert result.sentence.startswith("The student: 1.00 M parameters, 6.")
    assert "nothing comparable" in result.facts[2].detail and report.teacher is None
    assert "against" not in result.sentence and render_html(report)


def test_the_summary_shows_every_model_and_engine_and_marks_what_was_noisy(report):
    table = facts.summary_table(report)
    assert [row.cells[0] for row in table.rows] == [
        "teacher, PyTorch", "ort-fp32", "student, PyTorch", "ort-fp32", "ort-int8", "trt-fp16",
    ]  # fmt: skip
    assert [row.lead for row in table.rows] == [True, False, True, False, False, False]
    headings = [column.heading for column in table.columns]
    assert headings[3:6] == ["Batch 1, ms", "Batch 8, ms", "Per item, ms"]
    assert table.rows[1].cells[3].startswith("~") and not table.rows[3].cells[3].startswith("~")
    assert table.rows[3].cells[headings.index("Top-1 accuracy")] == "97.1 %"
    assert table.rows[3].cells[-1] == "2.0e-05 (limit 1e-04)"
    assert any(note.startswith("~") for note in table.notes)


def test_the_summary_counts_the_operations_of_models_whose_operations_are_known():
    models = [ModelEntry(name="teacher", macs=12_300_000), ModelEntry(name="student", macs=4_100_000)]
    known = Report(title="t", task=TaskInfo(name="x"), models=models)
    (note,) = [note for note in facts.summary_table(known).notes if "Multiply-accumulate" in note]
    assert "teacher 12.3" in note and "student 4.1" in note


def test_the_latency_of_the_only_graph_stands_for_the_request_when_nothing_else_was_measured():
    entry = engine("student", "ort-fp32", 5.0, 0.9, end_to_end={}, latency={"classifier": {"1": latency(3.0)}})
    assert entry.whole["1"].p50 == latency(3.0).p50
    two = engine("student", "ort-fp32", 5.0, 0.9, end_to_end={}, latency={"a": {}, "b": {}})
    assert two.whole == {}


def test_parity_shows_the_worst_output_and_says_when_it_failed():
    good, bad = Parity(relative=1e-3, tolerance=1e-2), Parity(relative=5e-2, tolerance=1e-2)
    assert facts.parity_text(engine("s", "t", 1.0, 1.0, parity=[bad, good])) == "failed: 5.0e-02 (limit 1e-02)"
    assert facts.parity_text(engine("s", "t", 1.0, 1.0, parity=[Parity(tolerance=1e-2)])).startswith(
        "failed: not finite"
    )
    assert facts.parity_text(engine("s", "t", 1.0, 1.0, parity=[])) == "–"


def test_engines_show_the_memory_of_a_gpu_where_one_ran(report):
    table = facts.engine_table(report)
    assert "On the GPU, MB" not in [column.heading for column in table.columns]
    report.engines[-1].peak_device_memory_mb = 2048.0
    table = facts.engine_table(report)
    place = [column.heading for column in table.columns].index("On the GPU, MB")
    assert all(len(row.cells) == len(table.columns) for row in table.rows)
    assert [row.cells[place] for row in table.rows].count("2,048") == 1


def test_what_was_not_measured_lists_engines_that_did_not_run(report):
    assert facts.not_measured(report) == [
        "energy: no sensor",
        "student on trt-fp16: built, not measured: this machine has no GPU",
    ]


class Outline(HTMLParser):
    """Checks that tags close, and collects ids, headings, images and addresses."""

    VOID = frozenset({"meta", "img", "br", "link", "use", "path", "rect"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.ids, self.tags, self.attributes = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        self.ids += [value for name, value in attrs if name == "id"]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag, f"</{tag}> closes something else"


def test_the_page_is_well_formed_and_requests_nothing(page):
    outline = Outline(page)
    assert outline.open == []
    assert not {"script", "link", "iframe", "object", "embed"} & set(outline.tags)
    assert "http:" not in page and "https:" not in page and "@import" not in page and "url(http" not in page
    for tag, name, value in outline.attributes:
        if name in ("src", "href", "xlink:href"):
            assert value.startswith("#") or (tag == "img" and value.startswith("data:image/png;base64,"))
    assert "default-src 'none'" in page


def test_the_pages_ids_are_unique_and_its_references_resolve(page):
    outline = Outline(page)
    assert len(outline.ids) == len(set(outline.ids))
    wanted = [value[1:] for _, name, value in outline.attributes if name == "href"]
    wanted += re.findall(r"url\(#([^)]*)\)", page)
    assert set(wanted) <= set(outline.ids)


def test_the_page_is_accessible(page):
    outline = Outline(page)
    assert outline.tags.count("h1") == 1 and "nav" in outline.tags and ("html", "lang", "en") in outline.attributes
    assert outline.tags.count("svg") == sum(
        1 for tag, name, v in outline.attributes if (tag, name) == ("svg", "aria-label") and v
    )
    assert outline.tags.count("img") == sum(
        1 for tag, name, v in outline.attributes if (tag, name) == ("img", "alt") and v
    )
    assert ("th", "scope", "col") in outline.attributes and ("th", "scope", "row") in outline.attributes


def test_the_page_holds_its_sections_in_order(page):
    titles = re.findall(r"<h2[^>]*>([^<]*)</h2>", page)
    assert titles == [
        "Summary", "Quality and latency", "Latency and size", "Variants", "Training", "Samples", "Engines",
        "Not measured", "Notes", "Recipe", "Machine",
    ]  # fmt: skip
    for key in (
        "pareto-accuracy",
        "pareto-frechet-distance",
        "latency",
        "sizes",
        "curve-accuracy-parameters",
        "loss-0",
    ):
        assert f'id="{key}-figure_1"' in page


def test_plots_take_their_colours_from_the_page_so_that_they_work_on_dark(page):
    for drawing in re.findall(r"<svg.*?</svg>", page, re.DOTALL):
        assert "var(--series-" in drawing
        assert not re.search(r"#[0-9a-f]{6}\b", drawing), "a colour of matplotlib's own is left"
        assert "DejaVu" not in drawing and "<style" not in drawing
    assert "prefers-color-scheme: dark" in page and "@media print" in page


def test_the_same_report_gives_the_same_page(report, page):
    assert render_html(report) == page


def test_text_of_the_user_is_escaped_everywhere():
    nasty = "<script>alert('x')</script> & \"|` *b*"
    report = full_report()
    report.title = report.command = report.task.name = nasty
    report.notes, report.skipped, report.recipe, report.machine = (
        [nasty],
        [nasty],
        {nasty: nasty},
        {"os": nasty, nasty: 1},
    )
    report.models[1].name = nasty
    report.engines = [engine(nasty, nasty, 3.0, 0.9, latency={nasty: {"1": latency(1.0)}}, notes=[nasty])]
    report.task.metrics = [ACCURACY.model_copy(update={"name": nasty, "label": nasty, "unit": nasty})]
    report.engines[0].metrics = report.models[1].metrics = {nasty: 0.5}
    report.training = {nasty: {nasty: [(0, 1.0), (1, 2.0)]}}
    report.samples = [SampleSheet(title=nasty, png_base64=PNG, caption=nasty)]
    report.curve = [CurvePoint(label=nasty, model=nasty, parameters=n, metrics={nasty: 0.1 * n}) for n in (1, 2)]
    page, text = render_html(report), render_markdown(report)
    assert "<script" not in page and Outline(page).open == []
    outside = re.sub(r"^(`{3,}).*?^\1$", "", text, flags=re.DOTALL | re.MULTILINE)
    assert "<script" not in re.sub(r"\\<", "", outside)


def test_a_report_of_nothing_still_renders():
    report = Report(title="empty", task=TaskInfo(name="none"))
    assert "No model was measured." in render_html(report) and "No model was measured." in render_markdown(report)


def test_the_page_keeps_its_tables_and_says_so_when_matplotlib_is_missing(report, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    page = render_html(report)
    assert "<svg" not in page and "matplotlib is not installed" in page and "97.1 %" in page


def test_markdown_tables_have_a_cell_for_every_column(report):
    text = render_markdown(report)
    blocks = [block.splitlines() for block in text.split("\n\n") if block.startswith("|")]
    assert len(blocks) == 6
    for block in blocks:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block}) == 1
    assert "| **student, PyTorch** | 1.00 M | 4.00 MB |" in text
    assert "- student on trt-fp16: built, not measured: this machine has no GPU" in text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (0.00001234, "1.2e-05"),
        (0.01234, "0.0123"),
        (9.996, "10.0"),
        (99.96, "100"),
        (12345.6, "12,346"),
        (None, "–"),
    ],
)
def test_numbers_have_three_significant_digits(value, text):
    assert format_number(value) == text


def test_units_follow_the_numbers():
    assert format_bytes(999_600) == "1.00 MB" and format_bytes(512) == "512 B" and format_count(3_214_000) == "3.21 M"
    assert format_metric(0.9712, ACCURACY) == "97.1 %" and format_metric(None, ACCURACY) == "–"
    assert format_difference(-0.004, ACCURACY) == "−0.4 points" and format_difference(0.0001, ACCURACY) == "±0.0 points"
    assert format_difference(0.25, DISTANCE) == "+0.250"
