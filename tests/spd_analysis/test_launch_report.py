import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from spd_analysis.evaluate_run import evaluate_run
from spd_analysis.launch_report import write_launch_report
from spd_core.config import load_config
from spd_core.run_dir import RunDir, read_metrics
from spd_launch.config import config_to_yaml

REPO = Path(__file__).parents[2]
COEFF = "losses.importance_minimality.coeff"


class Page(HTMLParser):
    """What a browser would load, and the cells of every table of runs."""

    def __init__(self, page):
        super().__init__()
        self.loaded, self.links, self.tables, self.heading = [], [], [], False
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.loaded += [attrs[name] for name in ("src", "srcset", "xlink:href") if name in attrs]
        self.loaded += [attrs["href"]] if tag == "link" else []
        self.links += [attrs["href"]] if tag == "a" else []
        match tag, attrs.get("class"):
            case "table", "runs":
                self.tables.append({"head": [], "rows": {}})
            case "th", _ if self.tables:
                self.tables[-1]["head"].append("")
                self.heading = True
            case "tr", _ if "data-run" in attrs:
                self.row = self.tables[-1]["rows"].setdefault(attrs["data-run"], [])
            case "td", _ if "data-value" in attrs:
                self.row.append(attrs["data-value"])

    def handle_endtag(self, tag):
        self.heading = self.heading and tag != "th"

    def handle_data(self, data):
        if self.heading:
            self.tables[-1]["head"][-1] += data

    def column(self, name, table=0):
        place = self.tables[table]["head"].index(name)
        return {run: cells[place] for run, cells in self.tables[table]["rows"].items()}


@pytest.fixture
def launched(trained, tmp_path):
    """A launch of runs that were given these overrides (and others that they do not differ in)."""

    def make(*of_runs, overrides=()):
        folder = tmp_path / "launches" / "a_launch"
        folder.mkdir(parents=True)
        runs, rows = [], []
        for i, typed in enumerate(of_runs):
            run_dir = trained(f"run-{i}", *overrides, *(f"{k}={v}" for k, v in typed.items()))
            runs.append(run_dir)
            told = {"experiment": "tms_5-2", "cluster": "local", **typed}
            varies = {"not.typed": i, **{key: json.loads(value) for key, value in typed.items()}}
            rows.append({"run_id": run_dir.path.name, "overrides": told, "varies": varies})
        write_launch(folder, rows)
        return folder, runs

    return make


def write_launch(folder, rows):
    rows = [{"goal": "decomposition", **row} for row in rows]
    (folder / "tasks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "launch.yaml").write_text("time: now\ncommand: spd_launch <b> seed=0,1\n")


def last_values(run_dir):
    return {key: value for record in read_metrics(run_dir) for key, value in record.items()}


def test_a_row_per_run_with_what_varies_and_what_came_out(launched):
    folder, runs = launched({"seed": "0", COEFF: "1e-3"}, {"seed": "1", COEFF: "3e-3"})
    path = write_launch_report(folder)
    made = Page(path.read_text())
    assert path == folder / "report.html"
    (table,) = made.tables
    assert list(table["rows"]) == ["run-0", "run-1"]
    assert table["head"][:4] == ["run", "state", "seed", COEFF]  # what was typed and differs
    assert made.column("seed") == {"run-0": "0", "run-1": "1"}
    assert made.column(COEFF) == {"run-0": "0.001", "run-1": "0.003"}
    for run_dir in runs:
        last, name = last_values(run_dir), run_dir.path.name
        for column, key in [
            ("stochastic_recon", "eval/loss/stochastic_recon"),
            ("mmcs linear1", "eval/mmcs/linear1"),
            ("identity_ci_error linear2", "eval/identity_ci_error/linear2"),
        ]:  # fmt: skip
            assert float(made.column(column)[name]) == pytest.approx(last[key])


def test_the_page_needs_nothing_but_itself(launched):
    folder, _ = launched({"seed": "0"}, {"seed": "1"},
                         overrides=["eval.metrics.permuted_ci_plots={when:slow}"])  # fmt: skip
    page = write_launch_report(folder).read_text()
    made = Page(page)
    assert len(made.loaded) >= 2 and all(x.startswith(("data:", "#")) for x in made.loaded)
    assert not re.search(r"@import|url\(\s*['\"]?http", page)
    assert made.links == [f"../../runs/run-{i}/report.html" for i in (0, 1)]
    assert "&lt;b&gt;" in page and "<b>" not in page
    assert page.count("<path data-run=") == 2


def test_runs_that_found_the_solution_are_counted(launched):
    folder, runs = launched({"seed": "0"}, {"seed": "1"})
    text = runs[1].metrics_file.read_text()
    text = re.sub(r'("eval/identity_ci_error/linear\d": )[\d.]+', r"\g<1>0", text)
    runs[1].metrics_file.write_text(text)
    assert "found by 1 of 2 runs" in write_launch_report(folder).read_text()


def test_a_run_that_was_not_evaluated_yet_has_an_empty_row(launched):
    folder, runs = launched({"seed": "0"}, {"seed": "1"})
    runs[1].metrics_file.unlink()
    made = Page(write_launch_report(folder).read_text())
    assert made.column("stochastic_recon")["run-1"] == ""
    assert made.column("state")["run-1"] == "not launched" and made.column("seed")["run-1"] == "1"


def test_many_modules_share_a_column_and_groups_keep_theirs(launched):
    folder, runs = launched({"seed": "0"}, overrides=["+eval.metrics.ci_l0.groups.total=['*']"])
    values = {f"eval/ci_l0_0.1/m{i}": i for i in range(5)} | {"eval/ci_l0_0.1/total": 10}
    with open(runs[0].metrics_file, "a") as file:
        file.write(json.dumps({"step": 7, **values}) + "\n")
    made = Page(write_launch_report(folder).read_text())
    (column,) = [name for name in made.tables[0]["head"] if "mean of" in name]
    # linear1 and linear2 are the two that were there before
    two = [last_values(runs[0])[f"eval/ci_l0_0.1/linear{i}"] for i in (1, 2)]
    assert column == "ci_l0_0.1, mean of 7 modules"
    assert float(made.column(column)["run-0"]) == pytest.approx((0 + 1 + 2 + 3 + 4 + sum(two)) / 7)
    assert float(made.column("ci_l0_0.1 total")["run-0"]) == 10


def test_evaluations_of_their_own_have_a_table_of_their_own(launched, one_process):
    folder, runs = launched({"seed": "0"}, {"seed": "1"})
    evaluation = evaluate_run(runs[0], [4, 6], 16, 1, "wide", one_process)
    page = write_launch_report(folder).read_text()
    made = Page(page)
    assert "Evaluation wide" in page and "1 batches of 16" in page
    wanted = evaluation.checkpoints[6]["eval/loss/stochastic_recon"]
    found = made.column("stochastic_recon", table=1)
    assert float(found["run-0"]) == pytest.approx(wanted) and found["run-1"] == ""


def test_what_was_found_about_the_launch_is_shown(launched):
    folder, _ = launched({"seed": "0"}, {"seed": "1"})
    found = folder / "analysis" / "compare"
    found.mkdir(parents=True)
    Image.new("RGB", (5, 5)).save(found / "similarity.png")
    captions = {"similarity.png": ["How alike", "1 is the same"]}
    (found / "summary.json").write_text(json.dumps({"matched": [], "captions": captions}))
    page = write_launch_report(folder).read_text()
    assert "How alike" in page and "1 is the same" in page


def test_small_pictures_of_every_run_that_has_them(launched):
    folder, runs = launched({"seed": "0"}, {"seed": "1"})
    for run_dir in runs[:1]:
        (run_dir.path / "clusterings" / "mine").mkdir(parents=True)
        Image.new("RGB", (900, 300)).save(run_dir.path / "clusterings" / "mine" / "clustering.png")
    page = write_launch_report(folder).read_text()
    assert "<h2>Clustering mine</h2>" in page and page.count("<figcaption>") == 1


def test_the_command_takes_a_launch(launched):
    folder, _ = launched({"seed": "0"}, {"seed": "1"})
    command = [sys.executable, "-m", "spd_analysis.report", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=REPO)
    assert done.returncode == 0 and f"wrote {folder / 'report.html'}" in done.stdout


CLICK = """<script>
const seen = [];
const note = () => seen.push([...document.querySelectorAll("tr[data-run]")]
    .map(row => row.dataset.run).join());
const [head] = [...document.querySelectorAll("th")].filter(th => th.textContent === "NAME");
note(); head.click(); note(); head.click(); note();
document.querySelector("tr[data-run='run-1']").onmouseenter();
seen.push([...document.querySelectorAll(".lines path.on")].map(p => p.dataset.run).join());
document.title = seen.join(" ");
</script>"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs Debian's chromium")
def test_a_browser_sorts_and_highlights(launched, tmp_path):
    folder, runs = launched({COEFF: "3e-2"}, {COEFF: "2e-3"}, {COEFF: "1e-3"}, {COEFF: "9e-3"})
    runs[3].metrics_file.unlink()
    text = write_launch_report(folder).read_text()
    for column, up in [(COEFF, "run-2,run-1,run-3,run-0"), ("stochastic_recon", None)]:
        if up is None:  # by value, and the run without one last both times
            values = {r.path.name: last_values(r)["eval/loss/stochastic_recon"] for r in runs[:3]}
            order = sorted(values, key=values.__getitem__)
            up, down = ",".join([*order, "run-3"]), ",".join([*order[::-1], "run-3"])
        else:
            down = ",".join(up.split(",")[::-1])
        page = tmp_path / "page.html"
        page.write_text(text.replace("</html>", CLICK.replace("NAME", column) + "</html>"))
        command = ["chromium", "--headless=new", "--no-sandbox", "--disable-gpu", "--dump-dom"]
        done = subprocess.run([*command, f"file://{page}"], capture_output=True, text=True,
                              timeout=240)  # fmt: skip
        title = re.search("<title>(.*?)</title>", done.stdout)[1]
        assert title == f"run-0,run-1,run-2,run-3 {up} {down} run-1"


@pytest.mark.slow
def test_a_hundred_runs_fit_into_ten_megabytes(trained, tmp_path):
    all_figures = [f"eval.metrics.{name}={{when:slow}}" for name in (
        "ci_histograms", "ci_mean_per_component", "permuted_ci_plots", "uv_plots",
    )]  # fmt: skip
    first = trained("run-0", *all_figures)
    config = load_config(first.config_file)
    for i in range(1, 100):
        shutil.copytree(first.path, first.path.with_name(f"run-{i}"))
        run_dir = RunDir(first.path.with_name(f"run-{i}"))
        run_dir.config_file.write_text(config_to_yaml(config.model_copy(update={"seed": i})))
    folder = tmp_path / "launches" / "a_launch"
    folder.mkdir(parents=True)
    rows = [{"run_id": f"run-{i}", "overrides": {}, "varies": {"seed": i}} for i in range(100)]
    write_launch(folder, rows)
    path = write_launch_report(folder)
    assert path.stat().st_size < 10_000_000
    assert path.read_text().count("<figure>") >= 200


def test_a_launch_of_targets_has_no_report(tmp_path):
    write_launch(tmp_path, [{"run_id": "a", "goal": "target"}])
    with pytest.raises(ValueError, match="targets only"):
        write_launch_report(tmp_path)
