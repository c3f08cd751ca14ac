import re
import subprocess
import sys

import pytest

from spd_analysis.gallery import write_gallery
from spd_core.run_dir import read_metrics

ONE_FIGURE = "eval.metrics.permuted_ci_plots={when:slow}"


def test_a_section_holds_every_seed_and_the_figures_of_the_first(trained, tmp_path):
    runs = [trained(f"run{seed}", ONE_FIGURE, f"seed={seed}") for seed in (3, 1)]
    page = tmp_path / "docs" / "gallery.md"
    page.parent.mkdir()
    write_gallery(runs, page)
    text = page.read_text()
    assert text.count("\n## tms_5-2\n") == 1
    for seed, run_dir in zip((3, 1), runs, strict=True):
        last = {k: v for record in read_metrics(run_dir) for k, v in record.items()}
        for module in ("linear1", "linear2"):
            (row,) = re.findall(rf"\| {seed} \| `{module}` \| (.*) \|", text)
            values = [float(last[f"eval/{m}/{module}"]) for m in ("identity_ci_error", "mmcs")]
            assert [float(cell) for cell in row.split(" | ")[:2]] == pytest.approx(values, rel=1e-3)
    (picture,) = re.findall(r"!\[.*\]\((.*)\)", text)
    shown = (runs[1].figures / "step_6" / "permuted_ci_plots.png").read_bytes()
    assert (page.parent / picture).read_bytes() == shown


def test_a_section_written_again_leaves_no_picture_of_the_first(trained, tmp_path):
    page = tmp_path / "gallery.md"
    write_gallery([trained("run", ONE_FIGURE)], page)
    write_gallery([trained("bare", "eval.metrics.losses={when:slow}")], page)
    assert not list((tmp_path / "gallery").iterdir())


def test_sections_of_other_experiments_stay(trained, tmp_path):
    together, page = tmp_path / "together.md", tmp_path / "gallery.md"
    one, other = (trained(n, ONE_FIGURE, f"experiment={n}") for n in ("tms_5-2", "tms_5-2-id"))
    write_gallery([one, other], together)
    write_gallery([other], page)
    write_gallery([trained("again", ONE_FIGURE)], page)
    write_gallery([one], page)
    assert page.read_text() == together.read_text().replace("(together/", "(gallery/")
    names = [{f.name for f in (tmp_path / p).iterdir()} for p in ("together", "gallery")]
    assert names[0] == names[1] and len(names[0]) == 2


def test_runs_that_cannot_be_shown_are_refused_by_name(trained, make_run_dir, tmp_path):
    one, same = trained("one"), trained("same")
    with pytest.raises(ValueError, match=r"runs/one and .*runs/same are both seed 0 of tms_5-2"):
        write_gallery([one, same], tmp_path / "gallery.md")
    with pytest.raises(ValueError, match=r"no run config at .*nothing"):
        write_gallery([make_run_dir("nothing")], tmp_path / "gallery.md")
    assert not (tmp_path / "gallery.md").exists()


def test_the_command_ends_with_a_message_not_a_traceback(tmp_path):
    command = [sys.executable, "-m", "spd_analysis.gallery", str(tmp_path / "none")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and done.stderr.startswith("error: no run config at")
