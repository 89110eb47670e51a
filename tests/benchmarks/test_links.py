"""The links' benchmark on a Wikipedia of sixty pages whose links follow from their categories."""

from __future__ import annotations

import csv
import gzip
import json
import math
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from benchmarks import links
from benchmarks.links import (
    LOSSES,
    TEMPERATURES,
    TOP,
    WITH_LOG_Q,
    categories,
    main,
    ranks_of,
    read_pages,
    rows_of_recalls,
    run,
    split,
    telling_words,
    title_grams,
)


@pytest.fixture
def wikipedia(tmp_path: Path) -> Path:
    """Six subjects of ten pages; a page links to those of its own subject, the first of them most often."""
    pages = [f"Page_{number}" for number in range(60)]
    with gzip.open(tmp_path / "items.csv.gz", "wt", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["item", "category", "text"])
        for number, page in enumerate(pages):
            rows.writerow([page, f"subject.S{number % 6}", f"all of them, word{number % 6} word{number % 6}"])
    random = np.random.default_rng(0)
    with gzip.open(tmp_path / "links.csv.gz", "wt", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["src", "dst"])
        for _ in range(6_000):
            source = int(random.integers(60))
            target = source % 6 + 6 * min(int(random.geometric(0.3)) - 1, 9)
            rows.writerow([pages[source], pages[target]])
    return tmp_path


def test_pages_have_title_categories_and_telling_words(wikipedia: Path) -> None:
    pages = read_pages(wikipedia)
    assert pages.ids[7] == "Page_7"
    assert pages.links.shape == (6_000, 2)
    assert np.all(pages.links % 6 == pages.links[:, :1] % 6)
    assert pages.features[7] == {
        "title": ["page", "7", "page 7", " pag", "page", "age ", "ge 7", "e 7 "],
        "category": ["subject.S1"],
        "text": ["word1", "all", "of", "them"],
    }


def test_features_by_value() -> None:
    assert title_grams("Ab_cd") == ["ab", "cd", "ab cd", " ab ", "ab c", "b cd", " cd "]
    assert categories("subject.A.B|subject.C") == ["subject.A", "subject.A.B", "subject.C"]
    # "b" is on two pages of three, "c" twice on one of two, "d" on a single page and so left out
    words = [Counter(["a", "b", "c", "c", "d"]), Counter(["a", "b"]), Counter(["a", "c"])]
    assert telling_words(words)[0] == ["c", "b", "a"]
    assert (1 + math.log(2)) * math.log(3 / 2) > math.log(3 / 2) > 0


def test_the_links_are_split_in_random_order_without_loss() -> None:
    all_links = np.arange(400).reshape(200, 2)
    learnt, held_out = split(all_links, 1)
    assert (len(learnt), len(held_out)) == (180, 20)
    assert sorted(np.concatenate([learnt, held_out]).tolist()) == all_links.tolist()
    assert split(all_links, 2)[1].tolist() != held_out.tolist() == split(all_links, 1)[1].tolist()


def test_ranks_are_those_of_a_slow_count_and_equal_scores_share_their_places() -> None:
    random = np.random.default_rng(0)
    scores = random.integers(0, 6, (50, 30)).astype(np.float32)
    target = random.integers(0, 30, 50)
    for row, rank in enumerate(ranks_of(scores, target).tolist()):
        own = scores[row, target[row]]
        equal = [place for place in range(30) if scores[row, place] == own]
        assert rank == sum(scores[row] > own) + (len(equal) - 1) / 2


def test_what_links_follow_is_learnt_and_the_correction_learns_what_is_linked_to_most(
    wikipedia: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With ten candidates left, plain spreads them; corrected puts the popular first, as they are held out most."""
    monkeypatch.setattr(links, "BATCH", 64)
    monkeypatch.setattr(links, "TOP", (3, 10))
    pages = read_pages(wikipedia)
    results = run(pages, "plain", 0.14, 0) | run(pages, "corrected", 0.14, 0)
    plain, corrected, with_log_q = (results[name] for name in ("plain", "corrected", WITH_LOG_Q))
    assert plain[1] > 0.95
    assert corrected[1] > 0.95
    best = 1 - 0.7**3
    assert corrected[0] == pytest.approx(best, abs=0.08)
    assert plain[0] < best - 0.05
    assert with_log_q[0] == pytest.approx(best, abs=0.08)
    assert run(pages, "plain", 0.14, 0)["plain"] == plain


def test_rows_are_means_over_the_seeds_and_the_gain_is_of_the_best() -> None:
    recalls = {
        ("plain", 0.05): [[0.1, 0.2, 0.3], [0.1, 0.2, 0.3]],
        ("plain", 0.14): [[0.2, 0.2, 0.3], [0.2, 0.2, 0.3]],
        ("corrected", 0.07): [[0.2, 0.4, 0.5], [0.4, 0.4, 0.5]],
    }
    rows = {row.name: row.value for row in rows_of_recalls(recalls)}
    assert rows["links.corrected.tau0.07.recall_at_10"] == pytest.approx(0.3)
    assert rows["links.corrected.tau0.07.recall_at_10.std"] == pytest.approx(0.1)
    assert rows["links.plain.tau0.05.recall_at_100"] == pytest.approx(0.3)
    assert rows["links.corrected.gain_over_plain_at_10"] == pytest.approx(0.5)


def test_the_command_writes_a_row_for_every_loss_temperature_and_k(
    wikipedia: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    out = tmp_path / "links.json"
    monkeypatch.setattr(sys, "argv", ["links", "--data", str(wikipedia), "--seeds", "1", "--json", str(out)])
    main()
    rows = {row["name"]: row["value"] for row in json.loads(out.read_text())["rows"]}
    served = [*LOSSES, WITH_LOG_Q]
    wanted = {f"links.{loss}.tau{tau}.recall_at_{k}" for loss in served for tau in TEMPERATURES for k in TOP}
    gains = {f"links.{loss}.gain_over_plain_at_10" for loss in served if loss != "plain"}
    assert wanted | gains == {n for n in rows if not n.endswith(".std")}
    assert all(0 <= rows[name] <= 1 for name in wanted)
