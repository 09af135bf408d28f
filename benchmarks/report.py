"""What a benchmark found: figures, their ratios against the targets, a table and JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from statistics import median, quantiles
from typing import Any

__all__ = ("Curves", "Panel", "Ratio", "Report", "Target", "quartiles")


@dataclass(frozen=True)
class Target:
    """A bound for the ratio of two contenders.

    :param over: contender above the fraction bar.
    :param under: contender below it.
    :param bound: the bound.
    :param at_most: whether the ratio is to be at most the bound, else at least.
    """

    over: str
    under: str
    bound: float
    at_most: bool = True


@dataclass(frozen=True)
class Ratio:
    """A measured ratio: made in each round of that round's two figures, then the median."""

    target: Target
    median: float
    quartiles: tuple[float, float]

    @property
    def reached(self) -> bool:
        """Tell whether the median keeps to the bound."""
        bound = self.target.bound
        return self.median <= bound if self.target.at_most else self.median >= bound

    def __str__(self) -> str:
        low, high = self.quartiles
        limit = f"at {'most' if self.target.at_most else 'least'} {self.target.bound:g}"
        return (
            f"{self.target.over} / {self.target.under}: {self.median:.3f}"
            f" ({low:.3f} to {high:.3f}), target {limit}:"
            f" {'reached' if self.reached else 'NOT REACHED'}"
        )

    def as_dict(self) -> dict[str, Any]:
        """Give the same for JSON."""
        figures = {"median": self.median, "quartiles": self.quartiles, "reached": self.reached}
        return asdict(self.target) | figures


@dataclass(frozen=True)
class Panel:
    """Contenders measured together.

    :param title: where.
    :param unit: of the figures.
    :param samples: contender -> one figure for each round.
    :param targets: the bounds for ratios among the contenders.
    """

    title: str
    unit: str
    samples: dict[str, list[float]]
    targets: tuple[Target, ...] = ()

    def ratios(self) -> list[Ratio]:
        """Compute the ratios that have targets."""
        return [self._ratio(target) for target in self.targets]

    def _ratio(self, target: Target) -> Ratio:
        pairs = zip(self.samples[target.over], self.samples[target.under], strict=True)
        ratios = [over / under for over, under in pairs]
        return Ratio(target, median(ratios), quartiles(ratios))

    def __str__(self) -> str:
        rounds = len(next(iter(self.samples.values())))
        width = max(map(len, self.samples))
        lines = [f"{self.title}, {self.unit}, median of {rounds} rounds (and quartiles)"]
        for name, figures in self.samples.items():
            low, high = quartiles(figures)
            lines += [f"  {name:{width}}  {median(figures):8.3f}  ({low:.3f} to {high:.3f})"]
        return "\n".join([*lines, *(f"  {ratio}" for ratio in self.ratios())])

    def as_dict(self) -> dict[str, Any]:
        """Give the same for JSON."""
        medians = {name: median(figures) for name, figures in self.samples.items()}
        ratios = [ratio.as_dict() for ratio in self.ratios()]
        figures = {"title": self.title, "unit": self.unit, "samples": self.samples}
        return {**figures, "medians": medians, "ratios": ratios}


@dataclass(frozen=True)
class Curves:
    """How a figure grows.

    :param title: what grows.
    :param unit: of the figures.
    :param along: what it grows with.
    :param steps: the values of that.
    :param samples: contender -> one list of figures, one per step, for each round.
    """

    title: str
    unit: str
    along: str
    steps: list[int]
    samples: dict[str, list[list[float]]]

    def medians(self) -> dict[str, list[float]]:
        """Give each contender's median at each step."""
        return {
            name: [median(column) for column in zip(*rounds, strict=True)]
            for name, rounds in self.samples.items()
        }

    def __str__(self) -> str:
        width = max(map(len, [*self.samples, self.along]))
        lines = [f"{self.title}, {self.unit}", f"  {self.along:{width}}"]
        lines[-1] += "".join(f"{step:9,d}" for step in self.steps)
        for name, figures in self.medians().items():
            lines += [f"  {name:{width}}" + "".join(f"{figure:9.2f}" for figure in figures)]
        return "\n".join(lines)


@dataclass
class Report:
    """Everything that one benchmark found.

    :param name: the benchmark's.
    :param compared: what is compared with what, in sentences.
    :param command: the command that measures it again.
    :param versions: software -> version.
    :param panels: contenders measured together.
    :param curves: figures that grow.
    :param missing: what could not be measured here, and why.
    """

    name: str
    compared: str
    command: str
    versions: dict[str, str]
    panels: list[Panel] = field(default_factory=list)
    curves: list[Curves] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        missing = [f"not measured, {reason}" for reason in self.missing]
        parts = [f"== {self.name} ==", self.compared, f"$ {self.command}\n{versions}"]
        return "\n\n".join([*parts, *map(str, self.panels), *map(str, self.curves), *missing])

    def summary(self) -> list[str]:
        """Give one line for each target."""
        return [
            f"{self.name}: {panel.title}: {ratio}"
            for panel in self.panels
            for ratio in panel.ratios()
        ]

    def as_dict(self) -> dict[str, Any]:
        """Give the same for JSON."""
        found = asdict(self)
        found["panels"] = [panel.as_dict() for panel in self.panels]
        return found


def quartiles(figures: list[float]) -> tuple[float, float]:
    """Give the lower and the upper quartile."""
    if len(figures) == 1:
        return figures[0], figures[0]
    low, _, high = quantiles(figures, n=4, method="inclusive")
    return low, high
