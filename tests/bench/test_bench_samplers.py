"""The benchmark of samplers: a record a run, kept, and the table."""

import json

import bench_samplers
from benching import samplers
from benching.samplers import LAWS, SETTINGS, Key, Law

TINY = (
    "--iterations",
    "6",
    "--batch_size",
    "8",
    "--num_steps",
    "4",
    "--gradient_steps",
    "1",
    "--hidden",
    "8",
)


def test_the_smallest_law_gets_a_record_and_a_row(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(LAWS, "many_well_5", Law(("--energy", "many_well", "--dimension", "1"), "one well"))
    monkeypatch.setitem(SETTINGS, "naas", (*TINY, "--num_samples", "50"))
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- samplers: table -->\n<!-- samplers: end -->\nafter\n")
    flags = ["--laws", "many_well_5", "--samplers", "naas", "--seeds", "0", "--page", str(page)]
    flags += ["--data", str(tmp_path / "data"), "--work", str(tmp_path / "work")]
    bench_samplers.main(flags)
    record = json.loads((tmp_path / "data" / f"{Key('many_well_5', 'naas', 0).name}.json").read_text())
    assert record["options"]["iterations"] == 6
    row = next(line for line in page.read_text().splitlines() if line.startswith("| one well | `naas` |"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert f"{record['samples']['transport']:.3g}" == cells[2]
    assert f"{record['weights']['log_z'] - record['log_z_exact']:.3g}" == cells[6]
    assert page.read_text().endswith("after\n")
    bench_samplers.main(flags)
    assert "kept" in capsys.readouterr().out.splitlines()[-1]


def test_every_sampler_has_settings_and_every_law_parses():
    assert set(SETTINGS) == set(samplers.SAMPLERS)
    assert {flag for law in LAWS.values() for flag in law.flags[::2]} == {"--energy", "--dimension"}
