import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from spd_analysis.report import write_report
from spd_core.run_dir import append_metrics
from spd_launch.config import config_to_yaml

REPO = Path(__file__).parent.parent.parent


class Links(HTMLParser):
    """Everything that a browser would load or follow."""

    def __init__(self, page):
        super().__init__()
        self.found, self.tags = [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.found += [v or "" for k, v in attrs if k in ("src", "href", "xlink:href", "srcset")]


def test_the_report_is_one_self_contained_page(trained):
    one_figure = "eval.metrics.permuted_ci_plots={when:slow}"
    run_dir = trained("my_run", one_figure)
    path = write_report(run_dir)
    page = path.read_text()
    links = Links(page)
    assert path == run_dir.report_file and page.startswith("<!doctype html>")
    assert all(link.startswith(("data:", "#")) for link in links.found)
    assert not re.search(r"@import|url\(\s*['\"]?http", page)
    assert not {"script", "link", "iframe"} & set(links.tags)
    assert links.tags.count("img") == 1 and "svg" in links.tags
    assert re.search(r"target tms of seed \d+, mean squared error \d\.\d\de-0\d", page)
    assert "my_run" in page and "stochastic_recon_layerwise" in page and "mmcs" in page


def test_names_are_escaped(trained):
    page = write_report(trained("a<b>&c", experiment="<i>x</i>")).read_text()
    assert "<b>" not in page and "<i>" not in page and "a&lt;b&gt;&amp;c" in page


def test_a_run_that_evaluates_nothing_but_losses(trained):
    none = [f"eval.metrics.{m}=null" for m in ("ci_l0", "identity_ci_error", "mmcs_ml2r")]
    page = write_report(trained("bare", *none)).read_text()
    assert "stochastic_recon" in page and "known solution" not in page


def test_a_folder_without_a_run_is_an_error(make_run_dir):
    with pytest.raises(ValueError, match=r"config\.yaml"):
        write_report(make_run_dir("empty"))


def test_a_run_without_an_evaluation_is_an_error(make_config, make_run_dir):
    run_dir = make_run_dir("early")
    run_dir.config_file.write_text(config_to_yaml(make_config()))
    run_dir.env_file.write_text('{"torch": "2", "device": "cpu"}')
    append_metrics(run_dir, {"step": 0, "loss/total": 1.0})
    with pytest.raises(ValueError, match="no evaluation"):
        write_report(run_dir)
    assert not run_dir.report_file.exists()


def test_a_run_that_never_started_is_an_error(make_config, make_run_dir):
    run_dir = make_run_dir("pending")
    run_dir.config_file.write_text(config_to_yaml(make_config()))
    with pytest.raises(ValueError, match="no evaluation"):
        write_report(run_dir)


def test_the_command_says_what_is_wrong_without_a_traceback(tmp_path):
    command = [sys.executable, "-m", "spd_analysis.report", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=REPO)
    assert result.returncode == 1
    assert "config.yaml" in result.stderr and "Traceback" not in result.stderr
