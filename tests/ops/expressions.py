"""What a PromQL expression names: for the tests of rules and dashboards."""

from __future__ import annotations

import promql_parser as promql
from prometheus_client import CollectorRegistry

RATE_INTERVAL = "$__rate_interval"
RATES = ("rate", "increase", "irate")


def parse(expression: str, rate_interval: str = "1m") -> promql.Expr:
    """The expression, Grafana's interval replaced by one that PromQL knows."""
    parsed: promql.Expr = promql.parse(expression.replace(RATE_INTERVAL, rate_interval))
    return parsed


def series_types(registry: CollectorRegistry) -> dict[str, str]:
    """Name of each series that is exposed → type of its metric."""
    return {sample.name: family.type for family in registry.collect() for sample in family.samples}


def label_names(registry: CollectorRegistry) -> dict[str, dict[str, set[str]]]:
    """Name of each series that is exposed → its labels → their values."""
    found: dict[str, dict[str, set[str]]] = {}
    for family in registry.collect():
        for sample in family.samples:
            labels = found.setdefault(sample.name, {})
            for name, value in sample.labels.items():
                labels.setdefault(name, set()).add(value)
    return found


def selectors(expression: promql.Expr) -> list[promql.VectorSelector]:
    """Every selector in it, those of ranges too."""
    found: list[promql.VectorSelector] = []
    promql.walk(expression, lambda node: found.append(node) if isinstance(node, promql.VectorSelector) else None)
    return found


def rated(expression: promql.Expr) -> set[str]:
    """Names of the series that stand directly in rate() or increase()."""
    found: set[str] = set()

    def visit(node: promql.Expr) -> None:
        if isinstance(node, promql.Call) and node.func.name in RATES:
            for argument in node.args:
                if isinstance(argument, promql.MatrixSelector) and argument.vector_selector.name:
                    found.add(argument.vector_selector.name)

    promql.walk(expression, visit)
    return found


def problems(expression: str, types: dict[str, str], labels: dict[str, dict[str, set[str]]]) -> list[str]:
    """What is wrong with it, held against the series that the code exposes.

    That is: a name, a label or a label's value that nothing exposes, a counter that is not rated, a gauge that is.
    """
    parsed = parse(expression)
    wrong = []
    for selector in selectors(parsed):
        name = selector.name
        if name not in types:
            wrong.append(f"nothing exposes {name}")
            continue
        for matcher in selector.matchers.matchers:
            if matcher.name in ("job", "instance"):
                continue
            if matcher.name not in labels[name]:
                wrong.append(f"{name} has no label {matcher.name}")
            elif matcher.op == promql.MatchOp.Equal and matcher.value not in labels[name][matcher.name]:
                wrong.append(f"{matcher.name} of {name} is never {matcher.value!r}")
        is_counted = types[name] in ("counter", "histogram")
        if is_counted != (name in rated(parsed)):
            wrong.append(f"{name} is a {types[name]}: {'rate it' if is_counted else 'do not rate it'}")
    return wrong
