"""What reports are made of: one HTML page that holds its pictures and needs no network."""

import base64
import io
import json
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from spd_analysis.summary import columns_of, format_value
from spd_core.run_dir import RunDir

CAPTIONS = {
    "permuted_ci_plots": (
        "Causal importances of single features",
        "Each row is one input feature, alone and at 0.75. Columns are subcomponents, reordered "
        "towards the diagonal. A clean diagonal and nothing else: one subcomponent per feature.",
    ),
    "uv_plots": (
        "Subcomponents against the target weight",
        "V reads from the module's input, U writes to its output; the sum of all rank-one "
        "subcomponents must give back the target weight on the right.",
    ),
    "ci_histograms": (
        "Distribution of causal importances",
        "Over all positions and subcomponents. Most are zero; what matters should be near one.",
    ),
    "component_activation_density": (
        "Activation density",
        "How often each subcomponent is causally important. Those at the floor are never needed.",
    ),
    "ci_mean_per_component": (
        "Mean causal importance",
        "Averaged over positions, subcomponents sorted.",
    ),
}
"""Figure -> title, and what it shows; in the order in which figures are shown."""

EMBEDDED_WHOLE = 1_000_000  # bytes; a larger picture is made smaller

PAGE = Template("""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>$name</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
:root { --ink: #1d2733; --quiet: #66727f; --line: #e3e8ed; --good: #1c7a4c; --bad: #a65b00; }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: #f6f8fa; margin: 0; }
main { max-width: ${width}px; margin: 0 auto; padding: 32px 24px 64px; }
h1 { font-size: 28px; margin: 0 0 4px; } h2 { font-size: 19px; margin: 0 0 6px; }
h3 { font-size: 16px; margin: 16px 0 6px; }
p { margin: 0 0 12px; } .quiet { color: var(--quiet); font-size: 14px; }
section { background: #fff; border: 1px solid var(--line); border-radius: 10px;
  padding: 20px 24px; margin-top: 20px; overflow-x: auto; }
img, svg { max-width: 100%; height: auto; display: block; margin: 0 auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: 5px 22px 5px 0; text-align: right; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; } th { color: var(--quiet); font-weight: 600; }
.tables { display: flex; gap: 56px; flex-wrap: wrap; align-items: flex-start; }
.verdict { font-weight: 600; font-size: 18px; }
.good { color: var(--good); } .bad { color: var(--bad); }
pre { font-size: 13px; overflow-x: auto; margin: 8px 0 0; }
summary { cursor: pointer; font-weight: 600; } a { color: #2b5f9e; }
$style</style></head><body><main>
<h1>$name</h1><p class="quiet">$subtitle</p>
$body
</main>$script</body></html>
""")


def page(
    name: str, subtitle: str, sections: list[str], width: int, style: str = "", script: str = ""
) -> str:
    """The whole page; `sections` are HTML, the rest of the text is escaped here."""
    return PAGE.substitute(
        name=escape(name), subtitle=escape(subtitle), body="\n".join(sections), width=width,
        style=style, script=f"<script>{script}</script>" if script else "",
    )  # fmt: skip


def section(title: str, caption: str, content: str) -> str:
    """A white box; `content` is HTML, title and caption are escaped here."""
    quiet = f"<p class='quiet'>{escape(caption)}</p>" if caption else ""
    return f"<section><h2>{escape(title)}</h2>{quiet}{content}</section>"


def folded(title: str, text: str) -> str:
    """Text behind a line that opens it."""
    inner = f"<summary>{escape(title)}</summary><pre>{escape(text)}</pre>"
    return f"<section><details>{inner}</details></section>"


def table(title: str, rows: dict[str, dict[str, float]]) -> str:
    columns = columns_of(rows)
    head = "".join(f"<th>{escape(name)}</th>" for name in [title, *columns])
    body = ""
    for name, values in rows.items():
        cells = [format_value(c, values[c]) if c in values else "" for c in columns]
        body += f"<tr><td>{escape(name)}</td>" + "".join(f"<td>{c}</td>" for c in cells) + "</tr>"
    return f"<table><tr>{head}</tr>{body}</table>"


def svg_of(figure: Any) -> str:
    """A matplotlib figure as an element of the page; the figure is closed."""
    from matplotlib import pyplot as plt

    file = io.StringIO()
    figure.savefig(file, format="svg")
    plt.close(figure)
    text = file.getvalue()
    return text[text.index("<svg") :]


def image(png: bytes, alt: str) -> str:
    data = base64.b64encode(png).decode()
    return f"<img alt='{escape(alt)}' src='data:image/png;base64,{data}'>"


def smaller(path: Path, width: int, colors: int) -> bytes:
    """A picture of at most this width in pixels, with a palette of so many colours."""
    from PIL import Image  # comes with matplotlib

    with Image.open(path) as opened:
        small = opened.convert("RGB")
        small.thumbnail((width, 10 * width))
        file = io.BytesIO()
        small.quantize(colors).save(file, "png", optimize=True)
    return file.getvalue()


def pictures(folder: Path, captions: dict[str, tuple[str, str]]) -> list[str]:
    """A section for every PNG of a folder, those with a caption (by file name) first."""
    known = list(captions)
    paths = sorted(folder.glob("*.png"), key=lambda p: (
        known.index(p.name) if p.name in known else len(known), p.name
    ))  # fmt: skip
    titles = {
        path: captions[path.name] if path.name in known else (path.stem, "") for path in paths
    }
    return [picture(path, *titles[path]) for path in paths]


def picture(path: Path, title: str, caption: str) -> str:
    """A section with a PNG, which is made smaller where it is very large."""
    whole = path.stat().st_size <= EMBEDDED_WHOLE
    png = path.read_bytes() if whole else smaller(path, width=1400, colors=128)
    return section(title, caption, image(png, title))


def last_figures(run_dir: RunDir) -> Path | None:
    """The folder of the figures of the last step that has any."""
    folders = sorted(run_dir.figures.glob("step_*"), key=lambda p: int(p.name.split("_")[1]))
    return folders[-1] if folders else None


def clusterings(run_dir: RunDir) -> dict[str, tuple[Path, str]]:
    """The pictures of a run's clusterings and of their ensembles: title -> file, what it shows."""
    found = {}
    for folder in sorted((run_dir.path / "clusterings").glob("[!.]*")):
        members = sorted(folder.glob("seed_*/clustering.png"))
        of_one = f"Clustering {folder.name}" + (f", {members[0].parent.name}" if members else "")
        tree = members[0] if members else folder / "clustering.png"
        distances = folder / "distances" / "distances.png"
        found[of_one] = tree, "How subcomponents merge, and which are active together."
        found[f"Ensemble {folder.name}"] = distances, "How far its members are from each other."
    return {title: (file, shown) for title, (file, shown) in found.items() if file.exists()}


def analyses(folder: Path) -> list[str]:
    """What lies in `FOLDER/analysis/NAME/`: every picture, and summary.json folded.

    In summary.json, `captions` may give a picture's title and what it shows:
    {"similarity.png": ["Similarity of the runs", "Left: ..."]}.
    """
    sections = []
    for found in sorted(p for p in (folder / "analysis").glob("[!.]*") if p.is_dir()):
        file = found / "summary.json"
        summary = json.loads(file.read_text()) if file.exists() else {}
        captions = {name: tuple(c) for name, c in summary.pop("captions", {}).items()}
        sections += pictures(found, captions)
        text = json.dumps(summary, indent=1)
        cut = "" if len(text) < 20_000 else f"\n... the rest is in {file}"
        sections.append(folded(f"analysis/{found.name}/summary.json", text[:20_000] + cut))
    return sections
