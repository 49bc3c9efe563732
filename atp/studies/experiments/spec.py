"""The experiment file: a question, the common settings, and the arms that answer it."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from atp.config import ATPConfig, shipped
from atp.config.overrides import explain
from atp.ground.errors import InputError, shorten
from atp.ground.reading import check_file, read_yaml_file
from atp.inputs.early import refuse_places
from atp.studies.compare.arms import Arm

_MOST_ARMS = 1000  # per experiment: lists under `vary` multiply fast


class ArmSpec(BaseModel):
    """One or more arms: each method with each combination of the values that `vary` lists, on top of `set`."""

    model_config = ConfigDict(extra="forbid")

    method: str | list[str]
    label: str | None = Field(None, description="name in tables and pictures; the method and its settings by default")
    set: dict[str, Any] = Field(default_factory=dict, description="config key -> value")
    vary: dict[str, list[Any]] = Field(default_factory=dict, description="config key -> values")


class ExperimentSpec(BaseModel):
    """One question. All its runs share the settings of `base` and differ by domain (a data recipe), arm and seed."""

    model_config = ConfigDict(extra="forbid")

    question: str
    base: str = Field("base.yaml", description="config of all runs, beside the experiment's file")
    domains: list[str] = Field(min_length=1)
    seeds: list[Annotated[int, Field(ge=0, lt=2**32)]] = Field([0], min_length=1)
    arms: list[ArmSpec] = Field(min_length=1)
    picture: Literal["intervals", "curve", "decisions"] = "intervals"
    x: str | None = Field(None, description="the varied key on the x axis of a curve")

    @classmethod
    def load(cls, name: str) -> tuple[ExperimentSpec, Path]:
        """(spec, its file), given a YAML file or the name of one in experiments/. Raises `InputError`."""
        path = Path(name) if name.endswith((".yaml", ".yml")) else Path("experiments") / f"{name}.yaml"
        path = shipped.find(path)
        known = ", ".join(found for found in shipped.names("experiments") if not found.endswith("base")) or "none"
        check_file(path, "experiment file", f"give a file, or a name (here: {known})")
        try:
            spec = cls.model_validate(read_yaml_file(path, "experiment file"))
        except ValidationError as error:
            raise InputError(f"{shorten(path)}: {explain(error, cls)}") from None
        if spec.picture == "curve" and not any(spec.x in arm.vary for arm in spec.arms):
            raise InputError(f"{shorten(path)}: a curve needs x, one of the keys that an arm varies")
        return spec, path

    def config(self, path: Path, domain: str, overrides: list[str]) -> ATPConfig:
        """The settings of all runs in a domain, which score the open half of its test data. Raises `InputError`."""
        base = shipped.find(path.parent / self.base)
        values = read_yaml_file(base, "base")
        if not isinstance(values, dict):
            raise InputError(f"base {shorten(base)} is not a mapping: it needs at least the key model")
        given = ["data.test_half=open", *overrides, f"data.recipe={domain}"]
        return ATPConfig.parse(values | {"output_dir": "set later"}, given)

    def labelled_arms(self) -> dict[str, Arm]:
        """Label -> arm. Raises `InputError` for an unknown method, a label shared by two arms, or too many arms."""
        found: dict[str, Arm] = {}
        count = sum(
            (1 if isinstance(spec.method, str) else len(spec.method)) * math.prod(map(len, spec.vary.values()))
            for spec in self.arms
        )
        if count > _MOST_ARMS:
            raise InputError(f"the experiment has {count:,} arms, more than {_MOST_ARMS:,}: vary less")
        for spec in self.arms:
            methods = [spec.method] if isinstance(spec.method, str) else spec.method
            for method, values in itertools.product(methods, itertools.product(*spec.vary.values())):
                varied = dict(zip(spec.vary, values, strict=True))
                # Settings name the folder of an arm: sorted, so that equal settings share a run across experiments.
                settings = sorted((spec.set | varied).items())
                arm = Arm(method, tuple(f"{key}={_text(value)}" for key, value in settings))
                label = " ".join([spec.label or method, *(f"{k.split('.')[-1]}={_text(v)}" for k, v in varied.items())])
                if label in found:
                    raise InputError(f"two arms are called '{shorten(label)}': give one of them another label")
                found[label] = arm
        return found


def refuse_experiment(name: str, domains: list[str], overrides: list[str]) -> None:
    """Raises `InputError` for what no run of an experiment can use, before torch is imported."""
    spec, path = ExperimentSpec.load(name)
    spec.labelled_arms()
    for domain in domains or spec.domains:
        refuse_places(spec.config(path, domain, overrides))


def _text(value: Any) -> str:
    """As an override has it."""
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)
