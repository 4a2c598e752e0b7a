"""A whole run as one validated object: the command line's flags and a YAML file are two ways to write it.

Recipe.from_yaml(path).resolve(flags) -> the full recipe: defaults of the method < file < flags < ``--set``
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator

from compressor.atomic import write_text
from compressor.errors import RequestError, nearest
from compressor.plain_yaml import YAMLError, dump_yaml, load_yaml
from compressor.validation import validated

if TYPE_CHECKING:
    from compressor.method import Method
    from compressor.profiles.target import Target
    from compressor.recipe_resolution import Flags

__all__ = ["Benchmark", "Evaluation", "MethodEntry", "Recipe", "load_recipe_target", "parse_sparsity"]

DEVICES = ("auto", "cpu", "cuda", "cuda:N", "mps", "xpu")
SPARSITY_FORMS = "N:M (2:4), a share (0.8) or block:ROWSxCOLUMNS:SHARE (block:32x32:0.8)"


def parse_sparsity(pattern: str) -> str:
    """Check a sparsity pattern and return it in its plain form.

    Raises:
        ValueError: It is none of the three forms.
    """
    text = str(pattern).strip()
    if match := re.fullmatch(r"(\d+):(\d+)", text):
        keep, group = int(match[1]), int(match[2])
        if not 1 <= keep < group:
            raise ValueError(f"in N:M, N of M weights stay, so 1 <= N < M; or write {SPARSITY_FORMS}")
        return f"{keep}:{group}"
    match = re.fullmatch(r"(?:block:(\d+)x(\d+):)?(0?\.\d+)", text)
    if match is None or not 0 < float(match[3]) < 1 or "0" in (match[1], match[2]):
        raise ValueError(f"must be {SPARSITY_FORMS}")
    return f"block:{int(match[1])}x{int(match[2])}:{float(match[3])}" if match[1] else str(float(match[3]))


def _known_device(value: str) -> str:
    if value not in DEVICES[:3] + DEVICES[4:] and not re.fullmatch(r"(cuda|xpu):\d+", value):
        raise ValueError(f"must be a device: {nearest(value, DEVICES)}")
    return value


def _plain_name(value: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", value):
        raise ValueError("must be made of letters, digits, '.', '_' and '-', and begin with a letter or digit")
    return value


def _usual_targets() -> list[str | dict[str, Any]]:
    return ["ort-fp32"]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class MethodEntry(_Section):
    """One method of the chain."""

    name: str
    """The method."""
    config: dict[str, Any] = Field(default_factory=dict)
    """Its configuration; `compress methods NAME` lists the keys."""

    def build(self) -> Method:
        """Import the method and make it with its configuration.

        Raises:
            RequestError: There is no such method, or its configuration is wrong.
        """
        from compressor.registry import load_method

        method = load_method(self.name)
        return method(validated(method.Config, self.config, prefix=self.name))


class Evaluation(_Section):
    """How quality is measured."""

    samples: int = Field(500, ge=10)
    """Samples that the teacher, the student and each engine are measured on."""
    seed: int = Field(0, ge=0)
    """Seed of the noise, the same for all."""


class Benchmark(_Section):
    """How latency is measured."""

    batches: list[Annotated[int, Field(ge=1)]] | None = Field(None, min_length=1)
    """Batch sizes; each target's own ``batch.benchmark`` by default."""
    seconds: float = Field(10.0, gt=0)
    """Time for all candidates of one batch size together."""
    rounds: int = Field(20, ge=3)
    """Rounds, in each of which every candidate runs."""


class Recipe(_Section):
    """One run. A recipe may be partial; `resolve` fills it up from the method's defaults and checks it as a whole."""

    name: Annotated[str, AfterValidator(_plain_name)] | None = None
    """Name of the run directory under ``runs/``; made of the methods and the data by default."""
    task: str | None = None
    """Task; the method's first by default."""
    task_options: dict[str, Any] = Field(default_factory=dict)
    """Options of the task: its own keys."""
    teachers: dict[str, list[str]] = Field(default_factory=dict)
    """Model specs of the teachers by role."""
    students: dict[str, str] = Field(default_factory=dict)
    """Model specs of students by role, for methods that let one choose."""
    data: dict[str, str] = Field(default_factory=dict)
    """Data specs by role."""
    methods: list[MethodEntry] = Field(default_factory=list)
    """The chain of methods; each takes the student of the one before."""
    sparsity: Annotated[str, AfterValidator(parse_sparsity)] | None = None
    """Pattern for the method ``sparsity`` at the end of the chain; in a resolved recipe that method stands there."""
    targets: list[str | dict[str, Any]] = Field(default_factory=_usual_targets)
    """Targets: names, paths of TOML files, or mappings (a whole target, or ``base`` and the keys that differ)."""
    budget: float = Field(1.0, gt=0, le=1000)
    """Factor on the number of steps of every phase."""
    steps: int | None = Field(None, ge=1)
    """Steps of the only training phase, for methods that have one; in a resolved recipe they stand with the method."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Seed of everything random."""
    device: Annotated[str, AfterValidator(_known_device)] = "auto"
    """Where training runs: auto, cpu, cuda, cuda:N, mps, xpu."""
    judge: str | None = None
    """Model spec of the net that quality is measured with; the task's own by default."""
    evaluation: Evaluation = Field(default_factory=Evaluation)
    """How quality is measured."""
    benchmark: Benchmark = Field(default_factory=Benchmark)
    """How latency is measured."""
    trust_remote_code: bool = False
    """Let model folders bring code that is run."""
    checkpoint_seconds: float = Field(60.0, gt=0)
    """Time between two checkpoints while training."""

    @field_validator("teachers", mode="before")
    @classmethod
    def _teachers_as_lists(cls, value: Any) -> Any:
        if isinstance(value, str):
            value = {"teacher": value}
        if isinstance(value, Mapping):
            return {role: [specs] if isinstance(specs, str) else specs for role, specs in value.items()}
        return value

    @field_validator("students", "data", mode="before")
    @classmethod
    def _one_role(cls, value: Any, info: Any) -> Any:
        return {{"students": "student", "data": "train"}[info.field_name]: value} if isinstance(value, str) else value

    @field_validator("methods", mode="before")
    @classmethod
    def _methods_as_entries(cls, value: Any) -> Any:
        entries = [value] if isinstance(value, (str, Mapping)) else value
        if isinstance(entries, (list, tuple)):
            return [{"name": entry} if isinstance(entry, str) else entry for entry in entries]
        return entries

    @field_validator("targets", mode="before")
    @classmethod
    def _targets_as_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, (str, Mapping)) else value

    @field_validator("sparsity", mode="before")
    @classmethod
    def _sparsity_as_text(cls, value: Any) -> Any:
        return str(value) if isinstance(value, float) else value

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> Recipe:
        """Validate a mapping.

        Raises:
            RequestError: One line that names the key, the value and what is allowed.
        """
        return validated(cls, values)

    @classmethod
    def from_yaml(cls, path: Path) -> Recipe:
        """Read a file; it may hold a part of a recipe only.

        Raises:
            RequestError: The file cannot be read, is no YAML, or holds a wrong key or value.
        """
        try:
            values = load_yaml(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise RequestError(f"cannot read the recipe {path}: {error.strerror or error}") from error
        except (YAMLError, UnicodeDecodeError) as error:
            mark = getattr(error, "problem_mark", None)
            where = f" (line {mark.line + 1})" if mark is not None else ""
            problem = getattr(error, "problem", None) or str(error).partition("\n")[0]
            raise RequestError(f"the recipe {path} is not valid YAML: {problem}{where}") from error
        if values is not None and not isinstance(values, Mapping):
            raise RequestError(f"the recipe {path} must be a mapping of keys, not a {type(values).__name__}")
        return validated(cls, values or {}, where=str(path))

    def to_dict(self) -> dict[str, Any]:
        """All keys as JSON values; what is not set (None, no students) is left out."""
        values = self.model_dump(mode="json", exclude_none=False)
        return {key: value for key, value in values.items() if value not in (None, {}, [])}

    def to_yaml(self, path: Path | None = None) -> str:
        """The recipe as YAML; written to ``path`` as well, if one is given."""
        text = dump_yaml(self.to_dict())
        if path is not None:
            write_text(path, text)
        return text

    def resolve(self, flags: Flags | None = None) -> Recipe:
        """Fill up and check this recipe: the methods' defaults < this recipe < flags < ``--set``.

        The result names every key of every configuration, passes the methods' `Needs`, and resolves to itself.

        Raises:
            RequestError: An unknown name, a wrong value, a missing role, an impossible chain.
        """
        from compressor.recipe_resolution import Flags, resolve

        return resolve(self, flags or Flags())

    def load_targets(self) -> list[Target]:
        """The targets, by the recipe's order.

        Raises:
            RequestError: An unknown target, a wrong key, or two of one name.
        """
        targets = [load_recipe_target(entry) for entry in self.targets]
        names = [target.name for target in targets]
        for name in names:
            if names.count(name) > 1:
                raise RequestError(f"two targets are named {name!r}: give one of them another name")
        return targets

    def default_directory(self) -> Path:
        """``runs/<methods>-<data>``, or ``runs/<name>``: the same recipe finds its directory again.

        Where the training differs from the method's default recipe, a short hash of it follows, so that the default run
        and a user's own do not meet in one directory.
        """
        if self.name:
            return Path("runs") / self.name
        from compressor.recipe_resolution import difference

        parts = [*(entry.name for entry in self.methods), _slug(next(iter(self.data.values()), ""))]
        return Path("runs") / "-".join(part for part in [*parts, difference(self)] if part)


def load_recipe_target(entry: str | Mapping[str, Any]) -> Target:
    """Load one entry of a recipe's ``targets``.

    Args:
        entry: A name, the path of a TOML file, or a mapping: ``{base: trt-fp16, batch: {max: 8}}`` or a whole target.

    Raises:
        RequestError: An unknown target or a wrong key.
    """
    from compressor.profiles.target import Target, load_target, with_overrides

    if isinstance(entry, str):
        return load_target(entry)
    if "base" in entry:
        changes = {key: value for key, value in entry.items() if key != "base"}
        return with_overrides(load_target(str(entry["base"])), dict(_flat(changes)))
    target = validated(Target, entry, prefix="targets")
    return target if target.name else target.model_copy(update={"name": f"{target.runtime}-{target.precision}"})


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    pairs: list[tuple[str, Any]] = []
    for key, value in values.items():
        # what lies deeper than a section is a value: provider_options, properties
        inside = isinstance(value, Mapping) and not prefix
        pairs += _flat(value, f"{key}.") if inside else [(f"{prefix}{key}", value)]
    return pairs


def _slug(spec: str) -> str:
    """The telling part of a spec, for a file name: "cats" of "imagefolder:/data/cats", "digits-16" of "digits:16"."""
    bare = re.fullmatch(r"\w+(:\d*)?(\?.*)?", spec)  # only a size or options behind the kind
    last = spec if bare else re.split(r"[:/\\]", spec.rstrip("/\\"))[-1]
    return re.sub(r"[^A-Za-z0-9._]+", "-", last).strip("-.")[:40]
