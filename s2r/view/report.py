"""Results as a table: several models side by side, with what is known by level and by number of samples.

    python -m s2r.view.report R1.json R2.json …           reports that `sample.py --report` wrote

                 accuracy  first_accuracy  trials     va  va_right     er     cp   icr  cir  finished  tokens
    base            100.0           100.0    1.00      –         –      –      –     –  0.0     100.0      12
    after SFT        50.0             0.0    1.50  100.0     100.0  100.0  100.0  50.0    –     100.0       0

s2r/metrics.py defines the columns. Each model is compared with the one before it, problem by problem, if both reports are
on the same file. With one response per problem, and with several (± is half of the 95 % interval over the problems):

    after SFT against base: 12 problems gained, 3 lost, McNemar's p = 0.035
    after SFT against base: +4.6 ± 3.0 points of accuracy

Reports of one name in different folders, such as seed-0/sft.json and seed-1/sft.json, are one model over several seeds: one
line, each number mean ± half of the 95 % interval. Then the lines below are mean differences, and those of each seed. The
folder's name tells the seed, so give the same ones in the same order for each model:

    sft against base: accuracy +9.4 ± 6.2 over 3 seeds (12 problems gained, 3 lost, McNemar's p = 0.035; …)

The scripts print `table`; the toy world's findings use `interval`.
"""

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from math import comb
from pathlib import Path
from statistics import mean, stdev

from mpmath import betainc, findroot

from s2r.run.flags import start

COLUMNS = ("accuracy", "first_accuracy", "trials", "va", "va_right", "er", "cp", "icr", "cir", "finished", "tokens")


@dataclass(frozen=True)
class Config:
    reports: list[str]  # files that sample.py --report wrote


def main(cfg: Config) -> None:
    rows = {}
    for path in cfg.reports:
        try:
            report = json.loads(Path(path).read_bytes())
        except (OSError, ValueError):  # no file, not JSON, or not UTF-8
            report = None
        if not isinstance(report, dict) or "by_level" not in report:
            raise ValueError(f"{path}: no report there; give a file that sample.py --report wrote")
        rows[path.removesuffix(".json")] = report
    seeds = defaultdict(dict)
    for path, report in rows.items():
        seeds[Path(path).name][Path(path).parent.name] = report
    if max(map(len, seeds.values())) > 1:
        if len(set(map(tuple, seeds.values()))) > 1 or sum(map(len, seeds.values())) < len(rows):
            counts = "; ".join(f"{name} of {', '.join(folders)}" for name, folders in seeds.items())
            raise ValueError(f"{counts}: give one report of each model and seed, the same seeds in the same order")
        print(f"mean ± half of the 95 % interval over {', '.join(next(iter(seeds.values())))}")
        return over_seeds({name: list(reports.values()) for name, reports in seeds.items()})
    print(table(rows))
    for (name, before), (other, after) in pairwise(rows.items()):
        if found := _paired(before, after):
            print(f"{other} against {name}: {found}")


def _paired(before: dict, after: dict) -> str | None:
    """The difference of two reports, problem by problem; None unless data file and number of responses are equal."""
    x, y = before.get("right"), after.get("right")
    same = all(before.get(key) == after.get(key) for key in ("data", "responses"))
    if not same or not x or not y or len(x) != len(y) or len(y) < 2:
        return None
    if after["responses"] == len(y):
        gained, lost, p = mcnemar(y, x)
        return f"{gained} problems gained, {lost} lost, McNemar's p = {p:.2g}"
    n = after["responses"] / len(y)
    return "{:+.1f} ± {:.1f} points of accuracy".format(*interval([100 * (b - a) / n for a, b in zip(x, y)]))


def over_seeds(rows: dict[str, list[dict]]) -> None:
    """Prints the table of models with several reports each, one per seed, in the same order of seeds."""
    print(table({name: _merged(reports) for name, reports in rows.items()}))
    for (name, before), (other, after) in pairwise(rows.items()):
        gain, half = interval([100 * (y["accuracy"] - x["accuracy"]) for x, y in zip(before, after)])
        found = f"{other} against {name}: accuracy {gain:+.1f} ± {half:.1f} over {len(before)} seeds"
        each = list(map(_paired, before, after))
        print(f"{found} ({'; '.join(each)})" if all(each) else found)


def _merged(values: list):
    """Reports as one, each number of them as its `interval`; None where one of them has no number."""
    if all(isinstance(value, dict) for value in values):
        return {key: _merged([value.get(key) for value in values]) for key in dict.fromkeys(chain(*values))}
    return interval(values) if all(isinstance(value, int | float) for value in values) else None


def table(rows: dict[str, dict]) -> str:
    """Results of `summarize` by name, one line each; below it, accuracy and trials by level, pass and majority by k.

    Fractions are in per cent. The accuracy is followed by the `standard_error` that `at_k` computes.
    """

    def cell(metrics: dict, name: str) -> str:
        value = metrics.get(name)
        if value is None:
            return "–"
        if isinstance(value, tuple):
            return " ±".join(cell({name: part}, name) for part in value)
        if name == "accuracy" and metrics.get("standard_error") is not None:
            return f"{100 * value:.1f} ±{100 * metrics['standard_error']:.1f}"
        return f"{value:.2f}" if name == "trials" else f"{value:.0f}" if name == "tokens" else f"{100 * value:.1f}"

    grids = [[["", *COLUMNS]] + [[name, *(cell(row, column) for column in COLUMNS)] for name, row in rows.items()]]
    if levels := sorted({level for row in rows.values() for level in row["by_level"]}, key=int):
        grids.append([["accuracy / trials", *(f"level {level}" for level in levels)]])
        for name, row in rows.items():
            by_level = [row["by_level"].get(level) or {} for level in levels]
            grids[-1].append([name, *(f"{cell(at, 'accuracy')} / {cell(at, 'trials')}" for at in by_level)])
    if ks := sorted({k for row in rows.values() for k in row.get("pass_at_k") or {}}, key=int):
        grids.append([["pass / maj", *(f"@{k}" for k in ks)]])
        for name, row in rows.items():
            passed, agreed = (row.get(name) or {} for name in ("pass_at_k", "maj_at_k"))
            grids[-1].append([name, *(f"{cell(passed, k)} / {cell(agreed, k)}" for k in ks)])
    return "\n\n".join(map(_grid, grids))


def _grid(lines: list[list[str]]) -> str:
    """Cells in columns: the first column aligned left, the others right."""
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in lines)


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half width of its two-sided 95 % confidence interval by Student's t distribution.

    Raises ValueError for fewer than 2 values.
    """
    freedom, error = len(values) - 1, stdev(values) / len(values) ** 0.5  # ν, and the mean's standard error

    def excess(t):  # P(|T| > t) − 5 %, where P is the incomplete beta function I_x(ν/2, 1/2) at x = ν/(ν + t²)
        return betainc(freedom / 2, 0.5, 0, freedom / (freedom + t * t), regularized=True) - 0.05

    t = float(findroot(excess, (1.9, 13), solver="anderson"))  # 12.7 for 2 values, 2.78 for 5, 1.96 for very many
    return mean(values), t * error


def mcnemar(after: Sequence, before: Sequence) -> tuple[int, int, float]:
    """Of the same problems, how many only `after` solves, how many only `before`, and the two-sided p of McNemar's test.

    The test is exact: if neither is better, each problem that one of them solves is a toss of a fair coin. Both have
    an entry per problem, "1" or True where it is solved.
    """
    pairs = [(x in ("1", True), y in ("1", True)) for x, y in zip(after, before, strict=True)]
    gained, lost = pairs.count((True, False)), pairs.count((False, True))
    tosses = gained + lost
    tail = sum(comb(tosses, i) for i in range(min(gained, lost) + 1)) / 2**tosses
    return gained, lost, min(1.0, 2 * tail)


if __name__ == "__main__":
    start(main, Config)
