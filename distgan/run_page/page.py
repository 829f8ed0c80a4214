"""Writes the page about runs: an HTML file with its style, script, numbers and pictures inside it.

Everything that comes out of a run's folder goes into the page as text: `escaped` in HTML, `as_json` in the data.
"""

import base64
import hashlib
import secrets
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

from distgan import files
from distgan.run_page import sections
from distgan.run_page.markup import as_json, cut, escaped, note, table
from distgan.run_page.records import RunRecord, Sample

_NUMBERS = 50_000  # most points of all curves together
_POINTS = 600  # most points of a curve
_PICTURES = 24  # most sample grids of a run
_PICTURE_BYTES = (5e6, 20e6)  # about, of the sample grids of one run, and of all runs together
_FEWEST = 3  # sample grids of a run, however large
_LOOKS = (8, 5)  # colours and dash patterns in page.css: 40 runs look different

_SECTIONS = {
    "Losses and scores": ("loss", "score"),
    "Evaluations": ("eval",),
    "Guard, speed and settings": ("guard", "throughput", "lr", "ramp", "augment"),
}
_ABOUT = {
    "loss/discriminator": "mean over the log interval",
    "loss/generator": "mean over the log interval",
    "score/real": "D's verdict on real images",
    "score/fake_before": "D's verdict on fakes before its update",
    "score/fake_after": "D's verdict on them after its update",
    "guard/spread": "of samples / of real images",
    "guard/memory": "0: unseen images look trained on; 1: fake",
    "eval/behind_best": "times as bad as the best so far",
    "eval/spread": "of features; 1: as diverse as real images",
    "eval/drawn": "classes that the generator draws",
    "eval/classes": "classes that there are",
    "throughput/images_per_s": "without the time of evaluations",
}


class Page:
    """The page about some runs, which can be written again and again as they go."""

    def __init__(self, runs: Sequence[Path], out: Path) -> None:
        """Begins without reading anything.

        Args:
            runs: folders of runs.
            out: the file to write.
        """
        self._records = [RunRecord(run) for run in runs]
        self._names = _names(runs)
        self._out = out
        self._picture = secrets.token_hex(16)  # stands for the next picture, and no text of a run can contain it

    def write(self) -> None:
        """Reads the runs and replaces the file in one step. Raises OSError if it cannot be written."""
        with files.whole(self._out) as partial, partial.open("wb") as stream:
            stream.writelines(self.render())

    def render(self) -> Iterator[bytes]:
        """Reads the runs and yields the page in parts: the pictures, which make most of it, are not copied."""
        for record in self._records:
            record.read()
        shown = self._pictures()
        several = len(self._records) > 1
        charts = _charts(self._records)
        parts = {
            "curves": ("Curves", self._curves(charts)),
            "samples": ("Samples", self._samples(shown)),
            "metrics": ("Metrics", sections.metrics(self._named)),
            "events": ("Starts, stops and troubles", sections.events(self._named)),
            "recipe": ("Recipe", sections.recipes(self._named)),
            "commands": ("Commands to go on", sections.commands(self._named)),
        }
        bodies = (f'<section id="{name}"><h2>{title}</h2>\n{body}</section>' for name, (title, body) in parts.items())
        title = f"{len(self._names)} runs: {', '.join(self._names)}" if several else f"Run {self._names[0]}"
        script = _asset("page.js")
        text = Template(_asset("page.html")).substitute(
            title=escaped(title),
            style=_asset("page.css"),
            script=script,
            script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
            written=escaped(f"Written by distgan at {_now()}. It shows the runs as they were then."),
            overview=self._overview(),
            contents=" ".join(f'<a href="#{name}">{title}</a>' for name, (title, _) in parts.items()),
            sections="\n".join(bodies),
            data=as_json({"runs": self._data(shown), "charts": charts}),
        )
        of_runs = zip(self._records, shown, strict=True)
        pictures = [record.picture(sample)[0] for record, chosen in of_runs for sample in chosen]
        for part, picture in zip(text.split(self._picture), [*pictures, b""], strict=True):
            yield part.encode()
            yield picture

    @property
    def complete(self) -> bool:
        """Tells whether all runs have done their last step, as of the last reading."""
        return all(record.complete for record in self._records)

    @property
    def _named(self) -> list[tuple[str, RunRecord]]:
        return list(zip(self._names, self._records, strict=True))

    @property
    def _most(self) -> int:
        """Returns the most points of a curve."""
        curves = sum(len(record.metrics.curves) for record in self._records)
        return max(2, min(_POINTS, _NUMBERS // max(1, curves)))

    # ------------------------------------------------------------------------------------------------------------------
    # What page.js draws.

    def _data(self, shown: Sequence[Sequence[Sample]]) -> list[dict[str, Any]]:
        return [
            {
                "name": name,
                "look": _look(i),
                "images_per_step": record.metrics.images_seen / max(1, record.metrics.step),
                **_thinned(record, self._most),
                "marks": sections.marks(record, len(self._records)),
                "samples": [sample.step for sample in shown[i]],
                "floor": {f"eval/{metric}": value for metric, value in (sections.floor(record) or {}).items()},
            }
            for i, (name, record) in enumerate(self._named)
        ]

    def _pictures(self) -> list[list[Sample]]:
        """Chooses the sample grids of each run: spread over the run, with the first and the last."""
        of_one, of_all = _PICTURE_BYTES
        bytes_each = min(of_one, of_all / len(self._records))
        shown = []
        for record in self._records:
            size = len(record.picture(record.samples[-1])[0]) if record.samples else 0
            most = max(_FEWEST, min(_PICTURES, int(bytes_each / (size + 1))))
            chosen = [sample for sample in _spread(record.samples, most) if record.picture(sample)[0]]
            record.forget_pictures(chosen)
            shown.append(chosen)
        return shown

    # ------------------------------------------------------------------------------------------------------------------
    # Sections.

    def _overview(self) -> str:
        rows = []
        for name, record in self._named:
            done, last = record.metrics.step, record.last_step
            speed = record.images_per_s
            rows.append(
                [
                    name,
                    sections.state(record),
                    f"{done:,} of {last:,}" if last is not None else f"{done:,}",
                    f"{record.metrics.images_seen:,}",
                    f"{speed:,.0f}" if speed is not None else "",
                    sections.best(record.best or record.last),
                ]
            )
        header = ["Run", "State", "Step", "Images seen", "Images/s (median)", "Best evaluation"]
        damaged = [
            note(f"{name}: {record.metrics.damaged:,} damaged lines of metrics.jsonl are left out.")
            for name, record in self._named
            if record.metrics.damaged
        ]
        return table("The runs", header, rows, numbers=(2, 3, 4)) + "".join(damaged)

    def _curves(self, charts: Sequence[dict[str, str]]) -> str:
        if not charts:
            return "<p>There is no line of metrics yet.</p>"
        parts = ["<noscript><p>The curves and the slider of the samples need JavaScript.</p></noscript>"]
        if len(self._names) > 1:
            boxes = (
                f'<label><input type="checkbox" data-run="{i}" checked autocomplete="off">{_swatch(i)}'
                f"{escaped(name)}</label>"
                for i, name in enumerate(self._names)
            )
            legend = "<legend>Runs shown in curves and samples</legend>"
            parts.append(f'<fieldset class="controls runs">{legend}{" ".join(boxes)}</fieldset>')
        parts.append(
            '<div class="controls"><label><input type="checkbox" id="log" autocomplete="off">Logarithmic</label>'
            '<label>Smoothing <input type="range" id="smoothing" min="0" max="0.99" step="0.01" value="0" '
            'autocomplete="off"> <span id="smoothing-value">0.00</span></label>'
            '<label>Across <select id="axis" autocomplete="off"><option value="step">step</option>'
            '<option value="images">images seen</option></select></label></div>'
        )
        parts.append(
            note(
                "Smoothing is the weight of the curve so far in an exponential moving average; the thin line is what "
                "was measured. The slider under a chart reads its values, and so does a pointer on it. Triangles on "
                "the axis are restarts, rollbacks and findings of the guard."
            )
        )
        parts += [note(said) for said in self._thinning()]
        here = {chart["section"]: None for chart in charts}
        for i, title in enumerate(_SECTIONS):
            if str(i) in here:
                parts.append(f'<h3>{title}</h3><div class="charts" id="charts-{i}"></div>')
        return "\n".join(parts)

    def _thinning(self) -> list[str]:
        return [
            f"{name} has {record.metrics.lines:,} lines of metrics: each point is the mean of "
            f"{-(-record.metrics.lines // self._most)} of them."
            for name, record in self._named
            if record.metrics.lines > self._most
        ]

    def _samples(self, shown: Sequence[Sequence[Sample]]) -> str:
        if not any(shown):
            return "<p>There are no samples yet.</p>"
        parts = [
            '<div class="samples-control"><label for="when">Samples up to <span id="when-value">the last step</span>'
            '</label><input type="range" id="when" min="0" autocomplete="off"></div>',
            note(
                "The averaged generator draws each grid from the same latents. "
                + "; ".join(
                    f"{name}: {len(chosen)} of {len(record.samples)} grids are here"
                    for (name, record), chosen in zip(self._named, shown, strict=True)
                )
                + "."
            ),
        ]
        figures = [
            self._figure(i, name, record, chosen)
            for i, ((name, record), chosen) in enumerate(zip(self._named, shown, strict=True))
            if chosen
        ]
        return "\n".join([*parts, '<div class="samples">', *figures, "</div>"])

    def _figure(self, i: int, name: str, record: RunRecord, chosen: Sequence[Sample]) -> str:
        """Returns the sample grids of a run, of which the script shows one; without it the last one is shown."""
        rows = _rows(record, chosen[-1])
        of_rows = ", classes in rows" if rows else ""
        pictures = ""
        for sample in chosen:
            described = escaped(f"Samples of {name} at step {sample.step:,}{of_rows}")
            hidden = "" if sample is chosen[-1] else " hidden"
            pictures += f'<img src="{self._picture}" alt="{described}"{hidden}>\n'
        if rows:
            labels = "".join(f"<li>{escaped(row)}</li>" for row in rows)
            listed = f'<ol class="rows" aria-label="Classes in rows">{labels}</ol>'
            pictures = f'<div class="grid-of-rows">{listed}<div>{pictures}</div></div>'
        swatch = f"{_swatch(i)} " if len(self._names) > 1 else ""
        heading = f'{swatch}{escaped(name)}: <span class="at">step {chosen[-1].step:,}</span>'
        return f'<figure data-run="{i}"><h3>{heading}</h3>\n{pictures}</figure>'


# ----------------------------------------------------------------------------------------------------------------------
# Curves.


def _charts(records: Iterable[RunRecord]) -> list[dict[str, str]]:
    """Lists the charts, section by section; numbers of an unknown kind come last."""
    kinds = [(kind, str(i)) for i, prefixes in enumerate(_SECTIONS.values()) for kind in prefixes]
    known = {kind: (place, section) for place, (kind, section) in enumerate(kinds)}
    unknown = (len(known), str(len(_SECTIONS) - 1))
    names = dict.fromkeys(name for record in records for name in record.metrics.curves)
    placed = {name: known.get(name.split("/")[0], unknown) for name in names}
    return [
        {"name": name, "section": placed[name][1], "about": _ABOUT.get(name, "")}
        for name in sorted(names, key=lambda name: placed[name][0])
    ]


def _thinned(record: RunRecord, most: int) -> dict[str, Any]:
    """Returns the curves as text of five digits; those at the same steps share these."""
    grids: dict[str, int] = {}
    curves = {}
    for name, curve in record.metrics.curves.items():
        steps, values = curve.thinned(most)
        grid = grids.setdefault(" ".join(map(str, steps)), len(grids))
        curves[name] = [grid, " ".join([f"{value:.5g}" for value in values])]
    return {"grids": list(grids), "curves": curves}


def _look(i: int) -> str:
    """Returns the classes of a run's colour and dash pattern."""
    colours, dashes = _LOOKS
    return f"c{i % colours} d{i % dashes}"


def _swatch(i: int) -> str:
    return f'<svg class="swatch {_look(i)}" viewBox="0 0 32 10" aria-hidden="true"></svg>'


# ----------------------------------------------------------------------------------------------------------------------
# Samples.


def _spread(samples: Sequence[Sample], most: int) -> list[Sample]:
    """Chooses at most `most`, at even distances, with the first and the last."""
    if len(samples) <= most:
        return list(samples)
    return [samples[round(i * (len(samples) - 1) / (most - 1))] for i in range(most)]


def _rows(record: RunRecord, sample: Sample) -> list[str]:
    """Returns the names of the classes in the rows of a grid, which has no more rows than Housekeeping draws."""
    size = record.recipe.get("data.image_size")
    height = size[0] if isinstance(size, list) else size
    if not record.classes or type(height) is not int:
        return []
    rows = (record.picture(sample)[1] - _GAP) // (height + _GAP)
    return [cut(name) for name in record.classes[:rows]]


_GAP = 2  # pixels between the images of a grid, as in pictures.grid


def _names(runs: Sequence[Path]) -> list[str]:
    """Names runs by their folders; by their paths if two folders have the same name."""
    short = [run.absolute().resolve().name for run in runs]
    return [cut(one if short.count(one) == 1 else str(run)) for one, run in zip(short, runs, strict=True)]


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def _asset(name: str) -> str:
    return (resources.files(__package__) / name).read_text(encoding="utf-8")
