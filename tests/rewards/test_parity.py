"""The comparer of `make parity` goes red on what it has to find; the packages themselves aren't needed."""

import json
from pathlib import Path

import numpy as np
import preprocessing_error
import pytest
import torch
from open_clip.model import CLIP
from parity.cases import SMALL_HPSV2, Case, write_weights
from parity.compare import LIMIT, QUANTITIES, compare, relative_difference
from parity.ours import score
from parity.report import table

from am_diffusers.system.text import marks, replace_table

ROOT = Path(__file__).parents[2]
RENDERED = {"parity": table, "preprocessing_error": preprocessing_error.table}


def sides() -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Equal arrays of every quantity for both sides."""
    random = np.random.default_rng(0)
    ours = {name: random.standard_normal((3, 4)).astype(np.float32) for name in QUANTITIES}
    ours["token_ids"] = random.integers(0, 49408, (3, 77))
    return ours, {name: value.copy() for name, value in ours.items()}


def test_equal_sides_pass() -> None:
    rows = compare(*sides())
    assert [row.quantity for row in rows] == list(QUANTITIES)
    assert all(row.passed and row.difference == 0 for row in rows)


@pytest.mark.parametrize("quantity", [name for name in QUANTITIES if name != "token_ids"])
@pytest.mark.parametrize(("difference", "passed"), [(0.5 * LIMIT, True), (2 * LIMIT, False)])
def test_one_number_off(quantity: str, difference: float, passed: bool) -> None:
    ours, theirs = sides()
    ours[quantity] = ours[quantity].astype(np.float64)
    ours[quantity][1, 2] += difference * abs(theirs[quantity]).max()
    rows = {row.quantity: row for row in compare(ours, theirs)}
    assert rows.pop(quantity).passed is passed
    assert all(row.passed for row in rows.values())


def test_one_token_off() -> None:
    ours, theirs = sides()
    theirs["token_ids"][0, 0] = 10**6  # relative to which one token more is a millionth
    ours["token_ids"][0, 0] = 10**6 + 1
    assert not compare(ours, theirs)[0].passed


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_numbers_that_are_none(side: int, value: float) -> None:
    both = sides()
    both[side]["gradient"][0, 0] = value
    assert relative_difference(both[0]["gradient"], both[1]["gradient"]) == np.inf


def test_scores_that_hardly_vary_prove_nothing() -> None:
    ours, theirs = sides()
    ours["score"] = theirs["score"] = np.full(6, 0.3) + 1e-5 * np.arange(6)
    assert not compare(ours, theirs)[1].passed


def test_what_cannot_be_compared_is_an_error() -> None:
    ours, theirs = sides()
    with pytest.raises(ValueError, match="expected equal shapes"):
        compare(ours | {"score": ours["score"][:1]}, theirs)
    with pytest.raises(ValueError, match="all 0"):
        compare(ours, theirs | {"score": 0 * theirs["score"]})
    del ours["score"]
    with pytest.raises(ValueError, match="of both sides"):
        compare(ours, theirs)
    del theirs["score"]
    with pytest.raises(ValueError, match="of both sides"):
        compare(ours, theirs)


def test_our_side_sees_one_changed_weight(tmp_path: Path) -> None:
    """From published keys to arrays, with the shapes of our own small HPSv2 in place of the package's."""
    case = Case("hpsv2", "small", seed=0, threads=1)
    found = []
    for change in (0.0, 1e-2):
        folder = tmp_path / str(change)
        folder.mkdir()
        case.write(folder)
        write_shapes(folder)
        write_weights(folder, case.seed)
        content = torch.load(folder / "weights.pt", weights_only=True)
        content["state_dict"]["visual.conv1.weight"][0, 0, 0, 0] += change
        torch.save(content, folder / "weights.pt")
        found.append(score(case, folder))
    assert all(row.passed for row in compare(found[0], found[0]))
    failed = {row.quantity for row in compare(found[1], found[0]) if not row.passed}
    assert failed == QUANTITIES.keys() - {"token_ids", "official_pixels"}


def write_shapes(folder: Path) -> None:
    with torch.device("meta"):
        state = CLIP(**SMALL_HPSV2).state_dict()
    shapes = {name: (list(value.shape), not value.is_floating_point()) for name, value in state.items()}
    (folder / "weights.json").write_text(json.dumps(shapes))


@pytest.mark.parametrize(("name", "render"), RENDERED.items())
def test_tables_in_the_docs_are_those_of_the_results(name: str, render) -> None:
    page = (ROOT / "docs" / "rewards.md").read_text("utf-8")
    results = json.loads((ROOT / "docs" / f"{name}.json").read_text("utf-8"))
    assert replace_table(page, name, render(results)) == page


def test_committed_parity_passes_for_every_model() -> None:
    rows = json.loads((ROOT / "docs" / "parity.json").read_text("utf-8"))["rows"]
    models = {(row["reward"], row["size"], row["parameters"]) for row in rows}
    assert {("hpsv2", "full", 986_109_441), ("image_reward", "full", 446_665_953)} <= models
    assert len(models) == 4
    for row in rows:
        assert row["passed"] == (row["difference"] <= row["limit"])
        assert row["passed"]


def test_marks_that_are_missing() -> None:
    begin, end = marks("x")
    assert replace_table(f"a {begin} old {end} b", "x", "new") == f"a {begin}\nnew\n{end} b"
    for text in ("", begin, f"{end} {begin}", f"{begin} {end} {end}"):
        with pytest.raises(ValueError, match="once each"):
            replace_table(text, "x", "new")
