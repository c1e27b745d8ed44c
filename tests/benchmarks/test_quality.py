"""The quality benchmark on a tiny grid: samples, settings, rows that can be continued, and what is said of them."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from benchmarks.quality import __main__ as command
from benchmarks.quality import ablations
from benchmarks.quality.claims import Claim, judge
from benchmarks.quality.pools import pools
from benchmarks.quality.rows import Cell, Row, RowFile, Samples
from benchmarks.quality.runner import Runner
from benchmarks.quality.samples import LATE_KEY, TASKS, documents
from benchmarks.quality.settings import BUDGET_SHARES, Decoding, budgets, names, settings
from benchmarks.tiny_model import corpus
from losa_runtime.sparse.method import METHODS, method_class

GRID = ["--contexts", "512", "--tasks", "multi_key", "--budgets", "0.05", "--samples", "3", "--per-document", "2"]


def row(
    name: str = "quest", outcomes: str = "1111", bytes_ratio: float = 0.1, share: float | None = 0.03, **more: object
) -> Row:
    """A row that somebody might have measured; documents of four questions."""
    bits = outcomes.replace(" ", "")
    fields: dict[str, object] = {
        "name": name,
        "method": name,
        "options": {},
        "budget": None if share is None else round(share * 1000),
        "share": share,
        "task": "multi_value",
        "context": 1000,
        "steps": 8,
        "threshold": None,
        "samples": len(bits),
        "per_document": 4,
        "seed": 0,
        "page_size": 16,
        "outcomes": outcomes,
        "accuracy": bits.count("1") / len(bits),
        "ci95": (0.0, 1.0),
        "density_q": 0.1,
        "density_kv": 0.1,
        "active_rows": 16.0,
        "active_overlap": 1.0,
        "forwards_per_block": 8.0,
        "bytes_ratio": bytes_ratio,
        "block_bytes_ratio": bytes_ratio + 0.1,
        "seconds": 1.0,
        "commit": "none",
        "versions": {},
    }
    return Row.model_validate(fields | more)


def claim(rows: list[Row], name: str) -> Claim:
    return next(c for c in judge(rows) if c.name == name)


# --- samples and settings --------------------------------------------------------------------------------------------


def test_samples_are_a_function_of_the_seed_and_share_documents() -> None:
    drawn = documents("multi_value", 512, 10, 4, seed=5)
    assert drawn == documents("multi_value", 512, 10, 4, seed=5)
    assert [len(d.questions) for d in drawn] == [4, 4, 2]
    assert {q.task for d in drawn for q in d.questions} == {"multi_value"}
    assert all(len({q.text for q in d.questions}) == len(d.questions) for d in drawn)
    assert drawn[0].text != documents("multi_value", 512, 10, 4, seed=6)[0].text
    assert drawn[0].text != corpus.evaluation_task("multi_value", 512, 0)[0]


def test_a_document_with_one_fact_is_asked_once() -> None:
    assert [len(d.questions) for d in documents("single", 256, 3, 4, seed=0)] == [1, 1, 1]


def test_prompts_fit_the_context() -> None:
    for task in TASKS:
        for document in documents(task, 512, 4, 4, seed=1):
            assert all(350 < corpus.count_tokens(prompt) <= 512 for prompt in document.prompts)


def test_budgets_are_whole_pages_without_repetition() -> None:
    assert [b.tokens for b in budgets(4096, BUDGET_SHARES, 16)] == [48, 80, 128, 240, 496, 1024]
    assert [b.tokens for b in budgets(256, BUDGET_SHARES, 16)] == [16, 32, 64]
    assert [b.share for b in budgets(256, BUDGET_SHARES, 16)] == [0.01, 0.12, 0.25]


def test_every_registered_method_is_asked_at_every_budget() -> None:
    made = settings(names(), 4096, BUDGET_SHARES, 16)
    assert len(set(made)) == len(made)
    for method in METHODS:
        mine = [s for s in made if s.name == method]
        expected = 6 if method_class(method).has_budget else 5 if method == "flashblock" else 1
        assert len(mine) == expected, method
    assert settings(["losa", "dense"], 4096, (0.01,), 16)[0].name == "dense"


def test_every_variant_can_be_served_and_is_another_cell(bundled_checkpoint: Path) -> None:
    samples = Samples(decoding=Decoding(8), samples=4, per_document=4, seed=0, page_size=16)
    runner = Runner(str(bundled_checkpoint), 1024, running=2)
    made = ablations.settings(1024, 16)
    cells = [samples.cell(s, runner.resolve(s, Decoding(8)), "multi_key", 1024) for s in made]
    assert len({cell.key for cell in cells}) == len(cells)
    assert {setting.name for setting in made} == {variant.name for variant in ablations.variants()}
    pages = ablations.settings_of_pages(4096, 64)
    assert {setting.budget for setting in pages} == {64, 256}
    assert pages[0].name == "losa page_size 64"
    few = ablations.settings(4096, 16, ["ba_att", "dense"], [0.03, 0.12])
    assert {setting.method for setting in few} == {"ba_att"} and {setting.budget for setting in few} == {128, 496}
    [paper] = [
        setting for setting in few if setting.name == "ba_att block_size, sort 128, True" and setting.budget == 128
    ]
    assert dict(paper.options) == {"block_size": 128, "sort": True, "first_step": "dense"}
    assert ablations.settings_of_pages(4096, 64, ["ba_att"]) == []


def test_variants_stand_beside_their_defaults() -> None:
    rows = [row("losa", "1100"), row("losa active_tau 0.5", "1111"), row("losa", "1100", task=LATE_KEY)]
    console = Console(width=200, record=True, file=io.StringIO())
    ablations.table(rows, console)
    [line] = [line for line in console.export_text().splitlines() if "active_tau" in line]
    assert "100.0%" in line
    assert "+50.0 [" in line


def test_decoding_by_steps_and_by_confidence() -> None:
    assert Decoding(6).params == {"algorithm": "low_confidence_static", "denoising_steps": 6}
    assert Decoding(None).params == {"algorithm": "low_confidence_dynamic", "threshold": 0.9}


# --- a run -----------------------------------------------------------------------------------------------------------


def test_a_run_measures_what_is_missing_and_reports(tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    few = [*GRID, "--out", str(out), "--methods", "dense", "quest"]
    assert command.main(few) == 0
    first = out.read_text().splitlines()
    dense, quest = (Row.model_validate_json(line) for line in first)
    assert (dense.name, dense.accuracy, dense.bytes_ratio, dense.outcomes) == ("dense", 1.0, 1.0, "11 1")
    assert quest.budget == 32
    assert quest.density_kv is not None
    assert quest.bytes_ratio is not None
    assert 0.0 < quest.density_kv < quest.bytes_ratio < 1.0
    assert quest.options["first_step"] == "sparse"

    assert command.main([*few, "losa"]) == 0  # only what is new
    later = out.read_text().splitlines()
    assert later[:2] == first
    assert [json.loads(line)["name"] for line in later] == ["dense", "quest", "losa"]
    assert command.main([*few, "losa", "--report-only"]) == 0
    assert out.read_text().splitlines() == later
    assert (tmp_path / "rows_pareto.png").stat().st_size > 10_000
    assert len(json.loads((tmp_path / "rows_claims.json").read_text())) == 8


def test_late_keys_punish_a_support_that_is_fixed_too_early(tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    grid = [*GRID, "--tasks", LATE_KEY, "--out", str(out), "--methods"]
    assert command.main([*grid, "dense", "losa", "flashblock"]) == 0
    rows = {(row.name, row.options.get("refresh_tokens")): row for row in RowFile(out).rows}
    assert rows["dense", None].outcomes == rows["losa", None].outcomes == rows["flashblock", 1].outcomes == "11 1"
    assert rows["flashblock", 16].outcomes == "00 0"
    assert rows["flashblock", 16].bytes_ratio == 0.0
    assert rows["losa", None].active_rows == 5.0
    assert rows["dense", None].forwards_per_block == 8.0
    assert command.main([*GRID, "--out", str(out), "--methods", "dense"]) == 0  # the engine's cache is its own again
    assert RowFile(out).rows[-1].outcomes == "11 1"


def test_a_row_does_not_depend_on_its_company(tmp_path: Path) -> None:
    alone, company = tmp_path / "alone.jsonl", tmp_path / "company.jsonl"
    assert command.main([*GRID, "--out", str(alone), "--methods", "losa"]) == 0
    assert command.main([*GRID, "--out", str(company), "--methods", "dense", "mage", "losa"]) == 0
    [mine] = RowFile(alone).rows
    [same] = [r for r in RowFile(company).rows if r.name == "losa"]
    ignore = {"seconds", "commit"}
    assert mine.model_dump(exclude=ignore) == same.model_dump(exclude=ignore)


def test_another_default_is_another_cell() -> None:
    fields = row().model_dump(include=set(Cell.model_fields))
    cell = Cell.model_validate(fields)
    assert cell.key == Cell.model_validate(fields | {"share": 0.5}).key
    for change in ({"options": {"first_step": "dense"}}, {"budget": 64}, {"seed": 1}, {"steps": 4}, {"task": "single"}):
        assert cell.key != Cell.model_validate(fields | change).key


def test_rows_survive_the_file(tmp_path: Path) -> None:
    file = RowFile(tmp_path / "deep" / "rows.jsonl")
    rows = [row(), row("losa", "1010 1", options={"refresh_every": 0, "granularity": "layer", "keep": None})]
    file.append(rows)
    assert RowFile(file.path).rows == rows
    assert rows[1].documents == [[1, 0, 1, 0], [1]]


# --- claims ----------------------------------------------------------------------------------------------------------

ALL, HALF = "1111 " * 20, "1100 " * 20


def test_near_dense_looks_at_the_largest_budget_where_quest_loses() -> None:
    dense = row("dense", ALL, 1.0, None)
    good = [dense, row("quest", HALF), row("losa", ALL), row("quest", ALL, share=0.12), row("losa", HALF, share=0.12)]
    assert claim(good, "near_dense").verdict == "holds"
    assert claim([dense, row("quest", HALF), row("losa", HALF)], "near_dense").verdict == "does not hold"
    assert claim([dense, row("quest", ALL), row("losa", HALF)], "near_dense").verdict == "not decided"


def test_density_ratio() -> None:
    densities = {0.03: (0.16, 0.10), 0.06: (0.30, 0.20), 0.25: (0.60, 0.50)}
    rows = [
        row(name, share=share, density_kv=pair[i])
        for share, pair in densities.items()
        for i, name in enumerate(("quest", "losa"))
    ]
    assert claim(rows, "density_ratio").verdict == "holds"  # 1.2 at 25 % is beyond what is claimed
    assert claim(rows, "density_ratio_falls").verdict == "holds"
    wide = [*rows[:4], row("quest", share=0.12), row("losa", share=0.12)]
    assert claim(wide, "density_ratio").verdict == "does not hold"


def test_losa_plus_is_compared_at_no_more_bytes() -> None:
    """At 30 % of the bytes it has to be as good with its 20 %, although it would be with its 40 %."""
    plus = [row("losa_plus", HALF, 0.2, 0.01), row("losa_plus", ALL, 0.4, 0.12)]
    found = claim([*plus, row("quest", ALL, 0.3)], "losa_plus_not_worse_later_steps")
    assert found.verdict == "does not hold"
    assert "quest 3%" in found.because
    assert claim([*plus, row("quest", ALL, 0.4)], "losa_plus_not_worse_later_steps").verdict == "holds"
    few = [row("losa_plus", "1111 1110", 0.2), row("quest", "1111 1111", 0.3)]
    assert claim(few, "losa_plus_not_worse_later_steps").verdict == "not decided"
    below = claim([*plus, row("quest", ALL, 0.1)], "losa_plus_not_worse_later_steps")
    assert below.figures[0]["above"] == 1  # its cheapest reads more than the other


def test_fewer_bytes_takes_the_cheapest_within_a_point() -> None:
    rows = [
        row("dense", ALL, 1.0, None),
        row("losa", HALF, 0.1),
        row("losa", ALL, 0.3, 0.12),
        row("losa_plus", ALL, 0.2),
    ]
    found = claim(rows, "losa_plus_fewer_bytes_later_steps")
    assert found.verdict == "holds"
    assert found.figures[0] == {"context": "all", "dense": 1.0, "losa": 0.3, "losa_plus": 0.2}
    assert claim(rows[:-1], "losa_plus_fewer_bytes_later_steps").verdict == "not decided"
    rows[-1] = row("losa_plus", HALF, 0.2)
    assert claim(rows, "losa_plus_fewer_bytes_later_steps").verdict == "does not hold"


def test_two_rows_of_one_setting_and_place_are_refused() -> None:
    with pytest.raises(AssertionError, match="two rows"):
        pools([row(), row(seed=1)])


def test_quick_leaves_the_results_alone() -> None:
    args = command._arguments(["--quick"])
    assert (args.samples, args.contexts) == (8, [1024])
    assert "results" not in args.out.parts
