"""report.html: what it says and draws, that nothing from outside gets out of its place, and how a browser shows it."""

import base64
import html
import json
import math
import os
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import browser
import pytest
import reports
import torch
from builders import copy_folder
from conftest import SHORT
from hypothesis import given, settings
from hypothesis import strategies as st
from reports import HOSTILE
from safetensors.torch import load_file

from dsd_refine.masking import histograms as moments
from dsd_refine.masking.layers import Layer, Spot
from dsd_refine.report import figures, words
from dsd_refine.report.card import SourceCard, card
from dsd_refine.report.page import margin_of, page, read_lines
from dsd_refine.report.places import from_home
from dsd_refine.report.report import Report, summary

SECTIONS = ["verdict", "arms", "flips", "curves", "weights", "layers", "run", "warnings"]
MEANS = {"conv2.weight": (0.05, 0.045), "fc.weight": (0.1, 0.12), "conv1.weight": (0.2, 0.2), "fc.bias": (0.0, 0.0)}


class Reader(HTMLParser):
    """Elements with their attributes, the text outside style, and whether every element is closed in order."""

    EMPTY = ("meta", "link", "br", "path", "rect")

    def __init__(self, text):
        super().__init__()
        self.elements, self.open, self.words, self.style = [], [], [], ""
        self.feed(text)
        self.close()
        assert self.open == []
        self.text = "".join(self.words)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "style":
            self.style += data
        else:
            self.words.append(data)

    def all(self, tag, **attrs):
        return [found for name, found in self.elements if name == tag and attrs.items() <= found.items()]


def made(report=None, **changes):
    """The page's text of a report made for it."""
    given_ = {"log": reports.log(), "pictures": reports.pictures(), "recipe_yaml": reports.recipe(), "means": MEANS}
    return page(report or reports.report(warnings=["look out"]), **(given_ | changes))


def harmless(reader):
    """Nothing in the page runs, loads or leads away."""
    assert not {tag for tag, _ in reader.elements} & {
        "script",
        "iframe",
        "img",
        "object",
        "embed",
        "form",
        "base",
        "image",
        "use",
    }
    for tag, attrs in reader.elements:
        assert not [name for name in attrs if name.startswith("on") or name in ("src", "srcset", "xlink:href", "action")]
        if "href" in attrs:
            assert attrs["href"].startswith("#") or (tag, attrs["href"]) == ("link", "data:,")
        assert "url(" not in (attrs.get("style") or "")
    assert not re.search(r"@import|url\(|expression|</style", reader.style)
    policy = reader.all("meta", **{"http-equiv": "Content-Security-Policy"})[0]["content"]
    assert "default-src 'none'" in policy


# ---------------------------------------------------------------- what it says


def test_the_verdict_comes_first_and_everything_follows_in_order():
    reader = Reader(made())
    assert [attrs["id"] for attrs in reader.all("section")] == SECTIONS
    harmless(reader)
    text = " ".join(reader.text.split())
    for said in ("Better", "+0.0300", "+0.0150 to +0.0410", "1,000", "not-worse", "0.9300"):
        assert said in text, said
    assert "cannot be told from the dense control" in text
    assert "may come from training on, not from this mask" in text


def test_the_flip_table_adds_up():
    report = reports.report()
    for found in figures.flips(report):
        assert found.kept + found.gained + found.lost + found.missed == 1000
        assert found.kept + found.gained == round(1000 * report["arms"]["refined"]["accuracy"])
    assert [f.against for f in figures.flips(report)] == ["baseline", "dense"]


def test_no_gain_is_claimed_that_is_not_shown():
    for verdict in ("same", "inconclusive", "worse"):
        report = reports.report(verdict=verdict)
        said = " ".join([words.said(report), words.measured(report), *words.credit(report)])
        assert "better than the source" not in said
        assert "gained" not in said
    report = reports.report()
    report["comparison"]["refined_vs_dense"]["p_adjusted"] = 0.01
    assert "better than the dense control" in words.credit(report)[0]
    report["comparison"]["refined_vs_dense"]["delta"] = -0.02
    assert "worse than the dense control" in words.credit(report)[0]


def credited(credit, **p_values):
    """A better report with this credit, whose controls have these p values."""
    report = reports.report(credit=credit)
    found = report["comparison"].pop("refined_vs_dense")
    report["comparison"] |= {f"refined_vs_{arm}": found | {"p_adjusted": p} for arm, p in p_values.items()}
    return report


TRAINING_ON, BY_CHANCE = "training on without a mask", "training on with a mask drawn by chance"


@pytest.mark.parametrize(
    ("report", "sentence"),
    [
        (credited("mask", dense=0.01), f"better than the source, and better than {TRAINING_ON}"),
        (credited("mask", dense=0.01, random=0.01), f"the source, and better than {TRAINING_ON} and than {BY_CHANCE}"),
        (credited("training", dense=0.2), f"better than the source; no better than {TRAINING_ON}"),
        (credited("training", dense=0.01, random=0.2), f"better than the source; no better than {BY_CHANCE}"),
        (credited("training", dense=0.3, random=0.2), f"no better than {TRAINING_ON} or than {BY_CHANCE}"),
        (credited("unknown"), "better than the source; no control was run"),
    ],
)
def test_whose_doing_a_gain_is_stands_in_the_headline_s_sentence(report, sentence):
    """On the page, in the terminal and in the card; and only the mask's own gain is green."""
    page_, told = Reader(made(report)), summary(Report(report, Path("out")))
    written = card(report, SourceCard({}, ""), reports.recipe(), "import timm")
    for text in (words.said(report), page_.text.replace("Better than", "better than"), told, written):
        assert sentence in text
    classes = page_.all("section", id="verdict")[0]["class"].split()
    assert classes == ["verdict", "better", f"credit-{report['credit']}"]
    assert Report(report, Path("out")).credit == report["credit"]


def test_a_gain_of_training_on_has_not_the_colour_of_one_of_the_mask():
    rules = re.findall(r"([^{}]+)\{ --tone: var\((--[a-z]+)\)", Reader(made()).style)
    tone = {name.strip(): colour for names, colour in rules for name in names.split(",")}
    assert tone[".better"] == "--good"
    for other in (".credit-training", ".credit-unknown"):
        assert tone[other] not in (tone[".better"], None)
        assert list(tone).index(other) > list(tone).index(".better")  # of two classes the later rule holds
    assert ".credit-mask" not in tone


def test_rows_that_would_decide_are_said_where_they_are_more():
    for text in (made(reports.loss_report()), summary(Report(reports.loss_report(), Path("out")))):
        assert "5,400 evaluation rows would decide" in text
    assert "would decide" not in made(reports.loss_report(rows_to_decide=400))


def test_where_no_row_changed_it_is_said_that_nobody_knows():
    report = reports.report(verdict="inconclusive", credit="none")
    report["comparison"]["refined_vs_baseline"] = reports.comparison(0.0, -0.0038, 0.0038, 1.0, 0, 0)
    for text in (made(report), summary(Report(report, Path("out")))):
        assert "No row changed sides: 1,000 rows are too few" in text
    report["comparison"]["refined_vs_baseline"] = reports.comparison(0.0, -0.02, 0.02, 1.0, 9, 9)
    assert "How many rows would decide cannot be told from these." in made(report)


@pytest.mark.parametrize(
    ("p", "adjusted", "interval", "said"),
    [
        (0.01, 0.02, (-0.001, 0.04), "The interval reaches 0; the verdict goes by p."),
        (0.03, 0.06, (0.001, 0.04), "the verdict goes by p, which, adjusted for all comparisons, is not below 0.05"),
        (0.06, 0.12, (0.001, 0.04), "the verdict goes by p, which is not below 0.05"),
        (0.01, 0.02, (0.001, 0.04), None),
        (0.3, 0.6, (-0.001, 0.04), None),
    ],
)
def test_where_p_and_interval_differ_it_is_said_which_decides(p, adjusted, interval, said):
    report = reports.report(credit="training")
    report["comparison"]["refined_vs_baseline"] |= {"p_value": p, "p_adjusted": adjusted, "ci95": list(interval)}
    for text in (made(report), summary(Report(report, Path("out")))):
        assert "the verdict goes by p" in text if said else "the verdict goes by p" not in text
        assert said is None or said in text


@pytest.mark.parametrize(("rule", "said"), [("not-worse", "be it by chance"), ("non-inferior", "less than the margin below")])
def test_what_a_gate_lets_through_is_said(rule, said):
    report = reports.report(gate={"rule": rule, "passed": True})
    for text in (
        made(report),
        summary(Report(report, Path("out"))),
        card(report, SourceCard({}, ""), reports.recipe(), "import timm"),
    ):
        assert said in text


def test_places_of_this_machine_stay_here():
    report = reports.loss_report(
        argv=["run", "/data/secret/net", "--data=/data/secret/rows.csv", "-o", "/data/secret/out", "a/b"]
    )
    report["source"] |= {"model": "/data/secret/net", "resolved": "/data/secret/net"}
    report["output"]["path"] = "/data/secret/out"
    reader = Reader(made(report, recipe_yaml=reports.recipe(data="/data/secret/rows.csv")))
    assert "secret" not in reader.text
    for kept in ("net", "--data=rows.csv", "rows.csv", "a/b"):
        assert kept in reader.text
    assert "secret" not in card(report, SourceCard({}, ""), reports.recipe(data="/data/secret/rows.csv"), "import timm")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("{home}/nets/a", "~/nets/a"),
        ("--data={home}/d", "--data=~/d"),
        ("{home}", "~"),
        ("{home}less/x", "{home}less/x"),
        ("/mnt{home}/x", "/mnt{home}/x"),
        ("nets/a", "nets/a"),
        ("./a", "./a"),
        ("{home}/a: lost; {home}/b too", "~/a: lost; ~/b too"),
    ],
)
def test_the_home_directory_is_not_named(monkeypatch, text, shown):
    monkeypatch.setenv("HOME", "/home/someone")
    assert from_home(text.format(home="/home/someone")) == shown.format(home="/home/someone")


@pytest.mark.parametrize("p", [0.0, 1e-9, 0.00012, 0.049, 0.5, 1.0])
def test_a_p_value_is_never_shown_as_nothing(p):
    assert re.fullmatch(r"p (< 0.0001|= (0\.\d*[1-9]\d*|1))", words.p_words(p))


def test_what_is_missing_is_left_out():
    text = made(reports.loss_report(), log=reports.log(("refined",), looks=0), pictures={}, means=None)
    reader = Reader(text)
    harmless(reader)
    ids = [attrs["id"] for attrs in reader.all("section")]
    assert ids == [name for name in SECTIONS if name not in ("flips", "weights")]
    for said in ("None", "nan", "undefined"):
        assert said not in reader.text
    assert "the difference counts a decrease as positive" in reader.text
    assert "rejected/" in reader.text
    assert "holdout" not in reader.text.split("Learning curves")[1].split("Layers")[0]


def test_no_steps_no_curves():
    report = reports.report()
    for each in report["phases"]:
        each |= {
            "optimizer_steps": 0,
            "loss_first": None,
            "loss_last": None,
            "lr_first": None,
            "lr_peak": None,
            "lr_last": None,
            "seconds": 0.0,
        }
    reader = Reader(made(report, log=[]))
    assert not reader.all("section", id="curves")
    assert Reader(made(report, log=reports.log(steps=0, looks=1))).all("section", id="arms")


def test_several_seeds_have_their_own_intervals():
    report = reports.report()
    report |= {"seeds": reports.seeds_of(report), "selected": {"sparsity": 0.3, "epoch": 1, "seed": 17}}
    tries = tuple(f"{arm} try {n}" for arm in ("refined", "dense") for n in range(1, 7))
    reader = Reader(made(report, log=reports.log(tries, best="refined try 4")))
    text = " ".join(reader.text.split())
    assert "0.9200 ± 0.0040" in text
    assert "Mean over 3 seeds" in text
    assert "12 tries in all" in text
    assert "refined try 4, dense try 1" in text


def test_equal_inputs_give_equal_bytes():
    one, two = (made(log=iter(reports.log())) for _ in range(2))
    assert one == two
    assert json.loads(json.dumps(reports.report())) == reports.report()


# ---------------------------------------------------------------- nothing from outside gets out of its place


def everywhere(value, into):
    """A report whose every text from outside is `into`."""
    report = reports.report(warnings=[into, into], argv=["run", into])
    report["source"] |= {
        "model": into,
        "resolved": f"{value}/{into}",
        "revision": into,
        "files": [{"name": into, "sha256": into}],
    }
    report["output"] = {"path": into, "files": [{"name": into, "sha256": "b" * 64}]}
    report["labels"] = {"model": [into] * 30, "data": [into], "rule": into}
    report["environment"] = {into: into}
    report["task"] = report["gate"]["rule"] = into
    for part in report["data"].values():
        part |= {"skipped": [{"row": into, "reason": into}] * 25, "fingerprint": into}
    for each in report["layers"]:
        each["name"] = into
        each["excluded"] = each["excluded"] and into
    for each in report["phases"]:
        each["arm"] = each["kind"] = into
    report["arms"] = {
        "baseline": report["arms"]["baseline"],
        "refined": report["arms"]["refined"],
        into: report["arms"]["dense"],
    }
    found = report["comparison"]
    report["comparison"] = {
        "refined_vs_baseline": found["refined_vs_baseline"],
        f"refined_vs_{into}": found["refined_vs_dense"],
    }
    return report


@pytest.mark.parametrize(
    "text", [HOSTILE, "</style><script>x</script>", "' onmouseover='x", "\x00\x1b\udcff\u2028", "]]><!--", "a" * 3000]
)
def test_names_from_outside_stay_text(text):
    log = reports.log((f"refined {text}", text))
    pictures = {text: [{**one, "moment": text} for one in reports.pictures()["conv2.weight"]]}
    source = made(
        everywhere("x", text),
        log=log,
        pictures=pictures,
        recipe_yaml=reports.recipe(name=text, data=text),
        means={text: (1.0, 2.0)},
    )
    reader = Reader(source)
    harmless(reader)
    source.encode("utf-8")
    assert [attrs["id"] for attrs in reader.all("section")] == SECTIONS
    plain = Reader(made())
    assert {tag for tag, _ in reader.elements} == {tag for tag, _ in plain.elements} | {"ul", "li"}
    assert html.unescape(text.encode("utf-8", "replace").decode()).strip("\x00")[:40] in html.unescape(reader.text)


def test_the_template_is_not_read_twice():
    assert "{{ 7*7 }}" in Reader(made(reports.report(warnings=["{{ 7*7 }}"]))).text


# ---------------------------------------------------------------- figures

NUMBERS = st.floats(-1e6, 1e6, allow_nan=False)


@given(st.lists(NUMBERS, max_size=3000), st.integers(20, 500))
@settings(deadline=None, max_examples=50)
def test_thinning_keeps_ends_and_extremes(values, most):
    points = list(enumerate(values))
    thinned = figures.thin(points, most)
    assert len(thinned) <= most
    assert thinned == sorted(set(thinned)) or len(points) <= most
    assert set(thinned) <= set(points)
    if values:
        assert (thinned[0], thinned[-1]) == (points[0], points[-1])
        assert max(y for _, y in thinned) == max(values)
        assert min(y for _, y in thinned) == min(values)


@given(st.lists(NUMBERS, min_size=1, max_size=300))
def test_smoothing_keeps_the_steps_and_stays_within(values):
    smoothed = figures.smooth(list(enumerate(values)))
    assert [x for x, _ in smoothed] == list(range(len(values)))
    room = 1e-6 * max(1.0, *map(abs, values))
    assert all(min(values) - room <= y <= max(values) + room for _, y in smoothed)


@pytest.mark.parametrize("steps", [15, 300, 2000])
def test_short_last_batches_make_no_spikes(steps):
    """Every tenth batch has 2 rows instead of 64, the last one too, and a loss far off; the others' is 1."""
    losses = [9.0 if number % 10 == 9 or number == steps - 1 else 1.0 for number in range(steps)]
    sizes = [2.0 if loss > 1 else 64.0 for loss in losses]
    bold = [y for _, y in figures.smooth(list(enumerate(losses)), sizes)]
    assert max(bold) < 1.3
    plain = [y for _, y in figures.smooth(list(enumerate([1.0] * (steps - 1) + [9.0])))]
    assert plain[-1] < 4  # a single step at the end is one of a few, as elsewhere


def test_the_curve_of_a_run_weighs_its_batches():
    lines = [line for line in reports.log(("refined",)) if line["event"] == "step"]
    for entry in lines:
        entry |= {"loss": 1.0, "samples": 64} if entry["step"] % 8 else {"loss": 100.0, "samples": 1}
    panel = figures.curves(figures.read_log(lines), "accuracy", True).panels[0]
    tops = [min(float(y) for y in re.findall(r" ([\d.]+)", path)) for path in (panel.curves[0].faint, panel.curves[0].bold)]
    assert tops[0] < 100  # single steps reach the top
    assert tops[1] > 500


@given(st.lists(st.floats(-1e9, 1e9, allow_nan=False), max_size=5), st.floats(0, 1))
def test_ticks_are_round_and_lie_on_the_axis(values, pad):
    scale = figures.Scale.over(values, pad)
    assert scale.low < scale.high
    ticks = scale.ticks()
    assert 1 <= len(ticks) <= 7
    assert all(-0.1 <= tick.at <= figures.SIZE + 0.1 for tick in ticks)
    assert all(-1e-6 <= scale.at(v) <= figures.SIZE * (1 + 1e-9) for v in values)


@given(st.floats(1e-9, 1e6), st.floats(1.0, 1e12))
def test_ticks_of_a_logarithmic_axis(low, ratio):
    scale = figures.Scale.over([low, low * ratio], 0.04, log=True)
    assert len(scale.ticks()) <= 5
    assert all(-0.1 <= tick.at <= figures.SIZE + 0.1 for tick in scale.ticks())


def test_the_margin_of_a_loss_is_a_share_of_the_source_s():
    assert margin_of(reports.report(), {"margin": 0.005}) == 0.005
    assert margin_of(reports.loss_report(), {"margin": 0.005}) == pytest.approx(0.016)
    assert margin_of(reports.report(), {}) == 0.0


def test_intervals_stand_where_their_numbers_are():
    found = figures.forest(reports.report()["comparison"], 0.005)
    first, second = found.rows
    assert first.low < first.point < first.high
    assert found.zero < first.low  # all of it is right of 0
    assert second.low < found.zero < second.high
    assert found.margin[1] - found.zero == pytest.approx(found.zero - found.margin[0])
    assert (first.point - found.zero) / (found.margin[1] - found.zero) == pytest.approx(0.03 / 0.005)


def test_controls_share_the_axis_and_phases_are_told_apart():
    found = figures.curves(figures.read_log(reports.log()), "accuracy", True)
    assert [phase.name for phase in found.phases] == ["1 sparse", "2 dense"]
    assert [(phase.start, phase.end) for phase in found.phases] == [(0, 500), (500, 1000)]
    assert [panel.title for panel in found.panels] == ["training loss", "holdout accuracy", "learning rate"]
    assert [curve.arm for curve in found.panels[0].curves] == ["refined", "dense"]
    assert found.panels[0].curves[1].bold.count("M") == 2


@pytest.mark.parametrize("best", ["refined try 1", "refined try 2", "refined try 3"])
def test_of_several_tries_the_preferred_is_drawn(best):
    tries = tuple(f"{arm} try {n}" for arm in ("refined", "dense") for n in (1, 2, 3))
    found = figures.curves(figures.read_log(reports.log(tries, best=best)), "accuracy", True)
    assert found.shown == {"refined": best, "dense": "dense try 1"}  # among equals the earlier


def test_a_long_log_is_thinned():
    text = made(log=reports.log(("refined", "dense", "random"), steps=30_000, looks=700))
    paths = [attrs["d"] for attrs in Reader(text).all("path") if attrs.get("class", "").split()[0] in ("bold", "faint", "dots")]
    assert len(paths) >= 3 * 3 + 1
    assert max(path.count("L") + path.count("M") for path in paths) <= figures.POINTS
    assert len(text) < 400_000


def test_values_that_are_no_numbers_are_not_drawn():
    lines = reports.log()
    for entry in lines[5:9]:
        entry |= {"loss": math.nan, "lr": None}
    lines[12]["loss"] = math.inf
    paths = " ".join(attrs["d"] for attrs in Reader(made(log=lines)).all("path"))
    assert re.fullmatch(r"[MLHVhvz0-9. -]*", paths)


def test_three_hundred_layers_stay_small():
    names = [f"model.layers.{i}.self_attn.q_proj.with.a.rather.long.name.weight" for i in range(300)]
    report = reports.report(layers=[reports.layer(name, [4096, 4096]) for name in names])
    labels = tuple(f"{arm} try {n}" for arm in ("refined", "dense", "random") for n in range(1, 16))
    text = made(
        report,
        log=reports.log(labels, steps=600),
        pictures=reports.pictures(tuple(names[:4])),
        means=dict.fromkeys(names, (0.02, 0.021)),
    )
    assert len(text.encode()) < 600_000
    assert Reader(text).text.count("4096 × 4096") == 300


def test_the_spike_of_zeros_is_cut_and_named():
    (found,) = figures.histograms(reports.pictures())
    start, pruned = found.moments[:2]
    assert (start.spike, start.above, start.zero_share) == ("", None, 0)
    assert pruned.spike
    assert pruned.above == pruned.zero_share > 0.1
    assert start.area != pruned.area
    assert [one.moment for one in found.moments] == list(moments.MOMENTS)


# ---------------------------------------------------------------- the weights at five moments

ALL = torch.tensor([], dtype=torch.long)


def whole(name, *shape, excluded=None):
    return Layer(name, shape, (Spot(name, ALL, ALL),), 1, excluded)


def test_a_picture_counts_every_weight():
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(50, 40, generator=generator)
    layer, start = whole("a", 50, 40), moments.picture(whole("a", 50, 40), {"a": weights}, "start")
    assert sum(start["counts"]) == 2000
    assert (start["zeros"], len(start["counts"])) == (0, moments.BINS)
    low, high = start["edges"]
    assert low == -high
    assert (weights.abs() <= high).float().mean() == pytest.approx(moments.INSIDE, abs=0.001)
    inner = torch.histc(weights, moments.BINS - 2, low + (high - low) / moments.BINS, high - (high - low) / moments.BINS)
    assert torch.tensor(start["counts"][1:-1]).sub(inner).abs().max() <= 1  # rounding at the edges of bins
    pruned = weights.clone().reshape(-1)
    pruned[pruned.abs().argsort()[:600]] = 0
    found = moments.picture(layer, {"a": pruned.reshape(50, 40)}, "pruned", start["edges"])
    assert (found["zeros"], sum(found["counts"])) == (600, 1400)
    assert found["counts"][moments.BINS // 2] == 0  # nothing is left beside 0
    assert found["mean_abs"] == pytest.approx(float(pruned.abs().mean()), rel=1e-5)
    assert json.loads(json.dumps(found)) == found


def test_a_layer_s_own_elements_are_counted_wherever_they_are():
    """A fused tensor of the file that the model holds in two parameters, one of them shared with another layer."""
    parameters = {"q": torch.arange(1.0, 7.0).reshape(2, 3), "kv": torch.arange(10.0, 16.0)}
    layer = Layer("qk", (9,), (Spot("q", torch.arange(6), torch.arange(6)), Spot("kv", torch.arange(6, 9), torch.arange(3))))
    found = moments.picture(layer, parameters, "start")
    assert sum(found["counts"]) == 9
    expected = float(torch.cat([parameters["q"].reshape(-1), parameters["kv"][:3]]).mean())
    assert found["mean_abs"] == pytest.approx(expected)
    assert moments.mean_abs([layer, whole("kv", 6)], parameters) == {
        "qk": pytest.approx(expected),
        "kv": pytest.approx(float(parameters["kv"].mean())),
    }


@pytest.mark.parametrize("values", [torch.zeros(8), torch.tensor([3.0]), torch.full((5,), -2.0), torch.ones(4, 4, 2, 2).half()])
def test_odd_layers_have_pictures(values):
    found = moments.picture(whole("a", *values.shape), {"a": values.contiguous()}, "start")
    assert sum(found["counts"]) + found["zeros"] == values.numel()
    assert found["edges"][0] < found["edges"][1]


def test_memory_order_changes_nothing():
    weights = torch.randn(8, 4, 3, 3)
    plain, last = (
        moments.picture(whole("a", 8, 4, 3, 3), {"a": w}, "start")
        for w in (weights, weights.to(memory_format=torch.channels_last))
    )
    assert plain["counts"] == last["counts"]
    assert plain["mean_abs"] == pytest.approx(last["mean_abs"], rel=1e-6)


def test_pictures_taken_again_replace_and_keep_the_edges():
    layer, book = whole("a", 100), {}
    values = {"a": torch.randn(100)}
    moments.take(book, [layer], values, "start")
    edges = book["a"][0]["edges"]
    values["a"] *= 3
    for moment in ("pruned", "after S", "pruned"):
        moments.take(book, [layer], values, moment)
    assert [one["moment"] for one in book["a"]] == ["start", "after S", "pruned"]
    assert all(one["edges"] == edges for one in book["a"])
    assert all(sum(one["counts"]) == 100 for one in book["a"])
    assert json.loads(json.dumps(book)) == book


def test_chosen_layers_are_spread_over_the_depth_and_large():
    layers = [whole(f"l.{i}.{kind}", size) for i in (10, 11, 2, 3, 4, 5) for kind, size in (("a", 10), ("b", 20), ("c", 15))]
    layers.append(whole("huge", 10_000, excluded="embedding"))
    order = sorted((layer.name for layer in layers), key=lambda name: [int(p) if p.isdecimal() else 0 for p in name.split(".")])
    chosen = moments.choose(layers, dict.fromkeys(order, torch.zeros(1)))
    assert len(chosen) == moments.MOST
    assert all(layer.name.endswith(".b") for layer in chosen)
    depth = [int(layer.name.split(".")[1]) for layer in chosen]
    assert depth == sorted(depth)
    assert (depth[0], depth[-1] >= 10) == (2, True)
    assert [layer.name for layer in moments.choose(layers[:2], dict.fromkeys(order, torch.zeros(1)))] == ["l.10.a", "l.10.b"]
    assert moments.choose(layers[-1:], {"huge": torch.zeros(1)}) == []


# ---------------------------------------------------------------- a real run's page


def test_a_run_leaves_its_page(finished, made):
    text = (finished / "dsd/report.html").read_text()
    reader = Reader(text)
    harmless(reader)
    report = json.loads((finished / "dsd/report.json").read_text())
    assert reader.all("section", id="verdict")[0]["class"].split()[:2] == ["verdict", report["verdict"]]
    assert str(made) not in text
    assert str(finished) not in text
    for layer in report["layers"]:
        assert layer["name"] in reader.text
    cells = [each for name, each in reader.elements if name == "div" and each.get("class") == "cell"]
    assert len(cells) == len(moments.MOMENTS) * moments.MOST
    assert all(moment in reader.text for moment in moments.MOMENTS)
    source, found = (load_file(folder / "model.safetensors") for folder in (made / "timm", finished))
    name = next(layer["name"] for layer in report["layers"] if layer["excluded"] is None)
    for tensors in (source, found):
        assert f"{float(tensors[name].abs().mean()):#.4g}" in reader.text


@pytest.mark.parametrize("model", ["net", "./net/", "."])
def test_a_run_on_relative_paths_publishes_no_full_one(command, made, tmp_path, monkeypatch, model):
    copy_folder(made / "bert", tmp_path / "net")
    shutil.copy(made / "texts.csv", tmp_path / "texts.csv")
    monkeypatch.chdir(tmp_path / "net" if model == "." else tmp_path)
    up = ".." if model == "." else "."
    assert command(model, "--data", f"{up}/texts.csv", "-o", f"{up}/out", *SHORT, "--control", "none").code == 0
    report = json.loads((tmp_path / "out/dsd/report.json").read_text())
    assert report["source"]["model"] == model
    assert Path(report["source"]["resolved"]).name == "net"
    assert report["output"]["path"] == str(Path(up, "out"))
    for name in ("README.md", "dsd/report.html", "dsd/report.json"):
        text = (tmp_path / "out" / name).read_text()
        assert str(tmp_path) not in text
        assert "net" in text


def test_log_lines_are_read_one_by_one(tmp_path):
    (tmp_path / "log").write_text('{"a": 1}\n\n{"a": NaN}\n')
    lines = list(read_lines(tmp_path / "log"))
    assert lines[0] == {"a": 1}
    assert math.isnan(lines[1]["a"])


# ---------------------------------------------------------------- in a browser


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    if browser.MISSING:
        pytest.skip(browser.MISSING)
    with browser.browser(tmp_path_factory.mktemp("browser")) as opened:
        yield opened


def long_names():
    """A report with the longest things that it can hold."""
    report = everywhere("x", "averylongnamewithoutanyplacetobreakit" * 8)
    report |= {"seeds": reports.seeds_of(report, 12)}
    return report


@pytest.mark.parametrize("width", [360, 768, 1280])
@pytest.mark.parametrize("which", ["plain", "long", "loss"])
def test_a_browser_shows_it_and_asks_for_nothing(chromium, tmp_path, width, which):
    report = {"plain": reports.report(warnings=["w"]), "long": long_names(), "loss": reports.loss_report()}[which]
    names = ("layer1.weight", "layer2.weight") if which != "long" else ("a" * 200,)
    (tmp_path / "report.html").write_text(made(report, pictures=reports.pictures(names)))
    with browser.served(tmp_path) as (address, asked):
        chromium.open(f"{address}/report.html", width, dark=which == "loss")
        assert chromium.run("return [document.documentElement.scrollWidth <= innerWidth, innerWidth]") == [True, width]
        chromium.screenshot(screenshots(tmp_path) / f"{which}-{width}.png")
        if width == 1280 and which != "long":
            assert (
                chromium.run("return [...document.querySelectorAll('.scroll')].filter(e => e.scrollWidth > e.clientWidth)")
                == []
            )
        assert chromium.requests() == [f"{address}/report.html"]
        assert set(asked) == {"/report.html"}
    outside = """return [...document.querySelectorAll('main *')].filter(e => !e.closest('.scroll, pre') && !e.closest('svg')
        && e.getBoundingClientRect().right > innerWidth + 1).map(e => e.tagName + '.' + e.className)"""
    assert chromium.run(outside) == []
    assert chromium.errors() == []


def test_a_real_run_s_page_in_a_browser(chromium, finished, tmp_path):
    with browser.served(finished / "dsd") as (address, asked):
        for width in (360, 1280):
            chromium.open(f"{address}/report.html", width)
            assert chromium.run("return document.documentElement.scrollWidth <= innerWidth")
            chromium.screenshot(screenshots(tmp_path) / f"run-{width}.png")
            assert chromium.requests() == [f"{address}/report.html"]
        assert set(asked) == {"/report.html"}


def test_it_prints_with_everything_in_view(chromium, tmp_path):
    report = reports.report(layers=[reports.layer(f"layer.{i}.weight", [64, 64]) for i in range(120)])
    (tmp_path / "report.html").write_text(made(report))
    with browser.served(tmp_path) as (address, _):
        chromium.open(f"{address}/report.html", 760, media="print", dark=True)
        assert chromium.run("return getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        hidden = "return [...document.querySelectorAll('.scroll')].filter(e => e.scrollHeight > e.clientHeight + 2).length"
        assert chromium.run(hidden) == 0
        printed = chromium.devtools("Page.printToPDF", printBackground=True)["data"]
    assert base64.b64decode(printed).startswith(b"%PDF")


def screenshots(place):
    """Where pictures go: DSD_SCREENSHOTS if it is set, so that they can be looked at."""
    folder = Path(os.environ.get("DSD_SCREENSHOTS") or place / "screenshots")
    folder.mkdir(parents=True, exist_ok=True)
    return folder
