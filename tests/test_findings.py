"""The study of the paper's findings: rows, resumption, plot and tables. What it finds is in docs/findings.md."""

import csv
import importlib.util
import runpy
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def findings(monkeypatch):
    """benchmarks/findings.py with runs of a step or two."""
    spec = importlib.util.spec_from_file_location("findings", ROOT / "benchmarks" / "findings.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "findings", module)  # where dataclass looks for it
    spec.loader.exec_module(module)
    short = {"steps": 2, "batch": 2, "crop": 32, "encoder": 1, "decoder": 1}
    monkeypatch.setattr(module, "PCA_CROPS", 16)
    monkeypatch.setattr(module, "SIZE", 64)
    monkeypatch.setattr(
        module,
        "EXPERIMENTS",
        [
            module.Experiment("law", 16, 16, **short | {"steps": 0}),
            module.Experiment("law", 16, 16, **short),
            module.Experiment("law", 16, 16, "random", **short),
            module.Experiment("sizes", 16, 16, **short | {"decoder": 2}),
            module.Experiment("losses", 16, 4, pixel_loss="l1", eta=0.1, **short),
        ],
    )
    return module


@pytest.fixture
def command(findings, pictures, vgg_hed, tmp_path):
    def run(*more: str):
        fixed = ["--data", str(pictures), "--heldout", str(pictures), "--out", str(tmp_path / "findings.csv")]
        return CliRunner().invoke(findings.main, [*fixed, *(more or ("--vgg-hed", str(vgg_hed)))])

    return run


def rows_of(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_every_experiment_has_a_row_a_plot_and_its_place_in_the_tables(command, findings, tmp_path):
    result = command()
    assert result.exit_code == 0, result.output
    rows = rows_of(tmp_path / "findings.csv")
    assert [row["finding"] for row in rows] == ["law", "law", "law", "sizes", "losses"]
    assert len({row["psnr"] for row in rows}) == 5, "each run is another one"
    for row in rows:
        assert 5 < float(row["psnr"]) < 60 and float(row["kl"]) > 0 and row["torch"] and row["commit"] and row["date"]
        assert bool(row["vgg_hed"]) == (row["finding"] == "losses")
    assert float(rows[0]["psnr"]) > float(rows[2]["psnr"]) + 5, "PCA is no start from random weights"
    assert (tmp_path / "findings.png").stat().st_size > 5000

    generate = runpy.run_path(str(ROOT / "docs" / "generate.py"))
    generate["findings"].__globals__["RESULTS"] = tmp_path
    tables = {name: table() for name, table in generate["TABLES"].items() if name.startswith("findings_")}
    psnr = f"{float(rows[1]['psnr']):.2f}"
    assert f"| 4,096 | 16 | 16 | {float(rows[0]['psnr']):.2f} | {psnr} |" in tables["findings_law"]
    assert f"| 1 + 2 | {float(rows[3]['psnr']):.3f} | +0.000 |" in tables["findings_sizes"]
    assert f"| L1 + 0.1 VGG-HED | 1e-05 | {float(rows[4]['psnr']):.2f} |" in tables["findings_losses"]


def test_a_run_that_was_stopped_measures_only_what_is_missing(command, findings, tmp_path, monkeypatch):
    trained, train = [], findings.train
    monkeypatch.setattr(findings, "plot", lambda path, rows: path)

    def stop_at_the_third(experiment, *args):
        if len(trained) == 2:
            raise KeyboardInterrupt
        trained.append(experiment)
        return train(experiment, *args)

    monkeypatch.setattr(findings, "train", stop_at_the_third)
    assert command().exit_code == 1
    before = rows_of(tmp_path / "findings.csv")
    assert len(before) == 2
    monkeypatch.setattr(
        findings, "train", lambda experiment, *args: trained.append(experiment) or train(experiment, *args)
    )
    assert command().exit_code == 0
    assert trained == findings.EXPERIMENTS
    assert rows_of(tmp_path / "findings.csv")[:2] == before


def test_without_vgg_hed_the_losses_are_left_out_and_kept_where_they_were_measured(
    command, findings, tmp_path, monkeypatch
):
    monkeypatch.setattr(findings, "plot", lambda path, rows: path)
    result = command("--vgg-hed", "")
    assert result.exit_code == 0 and "left out, since it needs --vgg-hed: Experiment(finding='losses'" in result.output
    assert [row["finding"] for row in rows_of(tmp_path / "findings.csv")] == ["law", "law", "law", "sizes"]
    command()
    after = rows_of(tmp_path / "findings.csv")
    command("--vgg-hed", "")
    assert rows_of(tmp_path / "findings.csv") == after and after[-1]["finding"] == "losses"


def test_the_tables_pair_seeds_and_tell_their_spread(tmp_path):
    names = "finding,patch,channels,init,steps,encoder,decoder,seed,psnr"
    (tmp_path / "findings.csv").write_text(
        f"{names}\n" + "law,8,4,pca,9,2,4,0,20.0\nlaw,8,4,pca,9,2,4,1,20.4\nlaw,16,16,pca,9,2,4,0,21.0\n"
        "law,16,16,pca,9,2,4,1,21.2\nlaw,16,16,pca,0,2,4,0,20.5\nsizes,16,16,pca,9,2,2,0,20.0\n"
        "sizes,16,16,pca,9,2,6,0,20.3\nsizes,16,16,pca,9,2,6,1,20.5\n"
    )
    generate = runpy.run_path(str(ROOT / "docs" / "generate.py"))
    generate["findings"].__globals__["RESULTS"] = tmp_path
    tables = generate["TABLES"]
    assert (
        "| 4,096 | 16 | 16 | 20.50 | 21.10 (21.00 to 21.20) | +0.60 (+0.50 to +0.70) | - | 26.12 |"
        in tables["findings_law"]()
    )
    assert "| 4,096 | - | +0.90 (+0.80 to +1.00) | - | -0.05 |" in tables["findings_pairs"]()
    assert "| 9 | 20.00 | 21.00 | +1.00 |" in tables["findings_longer"]()
    assert "| 2 + 6 | 20.400 (20.300 to 20.500) | +0.300 |" in tables["findings_sizes"]()


def test_a_folder_that_is_not_there_is_one_sentence(findings, tmp_path):
    where = str(tmp_path / "nowhere")
    result = CliRunner().invoke(
        findings.main, ["--data", where, "--heldout", where, "--out", str(tmp_path / "findings.csv")]
    )
    assert result.exit_code == 1 and where in result.output and "Traceback" not in result.output
