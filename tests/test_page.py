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
import builders
import pytest
import reports
import torch
from builders import copy_folder
from conftest import SHORT
from hypothesis import example, given, settings
from hypothesis import strategies as st
from reports import HOSTILE
from safetensors.torch import load_file

from dsd_refine.evidence.damage import rising_warnings
from dsd_refine.masking import histograms
from dsd_refine.masking.layers import Layer, TensorSlice
from dsd_refine.report import figures, words
from dsd_refine.report.card import SourceCard, card
from dsd_refine.report.examples import examples
from dsd_refine.report.page import page, read_lines
from dsd_refine.report.places import from_home
from dsd_refine.report.report import Report, summary
from dsd_refine.report.rules import absolute_margin

SECTIONS = ["verdict", "arms", "flips", "examples", "curves", "weights", "layers", "cost", "run", "warnings"]
MEANS = {"conv2.weight": (0.05, 0.045), "fc.weight": (0.1, 0.12), "conv1.weight": (0.2, 0.2), "fc.bias": (0.0, 0.0)}


class Reader(HTMLParser):
    """Elements with their attributes, the text outside style, and whether every element is closed in order."""

    EMPTY = ("meta", "link", "br", "path", "rect", "img")

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


def rows_of(predictions, **options):
    return examples(predictions, **({"higher_is_better": True, "decided": True} | options))


def made(report=None, **changes):
    """The page's text of a report made for it."""
    given_ = {"log": reports.log(), "pictures": reports.pictures(), "recipe_yaml": reports.recipe(), "means": MEANS}
    given_ |= {"rows": rows_of(reports.predictions())}
    return page(report or reports.report(warnings=["look out"]), **(given_ | changes))


def harmless(reader):
    """Nothing in the page runs, loads or leads away."""
    assert not {tag for tag, _ in reader.elements} & {
        "script",
        "iframe",
        "object",
        "embed",
        "form",
        "base",
        "image",
        "use",
    }
    for tag, attrs in reader.elements:
        assert not [name for name in attrs if name.startswith("on") or name in ("srcset", "xlink:href", "action")]
        assert "src" not in attrs or (tag == "img" and re.fullmatch(r"data:image/jpeg;base64,[A-Za-z0-9+/=]+", attrs["src"]))
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
    text = " ".join(reader.text.replace("\u00a0", "~").split()).replace("~", "\u00a0")
    for said in ("Better", "+3.00", "+1.50 to +4.10", "1,000", "not-worse", "93.00\u00a0%"):
        assert said in text, said
    assert "not clearly different from the dense control" in text
    assert "may come from the training alone, not from this mask" in text


def test_the_flip_table_adds_up():
    report = reports.report()
    for found in figures.flips(report):
        assert found.both_right + found.gained + found.lost + found.both_wrong == 1000
        assert found.both_right + found.gained == round(1000 * report["arms"]["refined"]["accuracy"])
    assert [f.against for f in figures.flips(report)] == ["baseline", "dense"]


def test_no_gain_is_claimed_that_is_not_shown():
    for verdict in ("same", "inconclusive", "worse"):
        report = reports.report(verdict=verdict)
        said = " ".join([words.headline(report), words.measured(report), *words.credit(report)])
        assert "better than the source" not in said
        assert "gained" not in said
    report = reports.report()
    report["comparison"]["refined_vs_dense"]["p_adjusted"] = 0.01
    assert "better than the dense control" in words.credit(report)[0]
    report["comparison"]["refined_vs_dense"]["delta"] = -0.02
    assert "worse than the dense control" in words.credit(report)[0]


def credited(credit, behind=(), **p_values):
    """A better report with this credit, whose controls have these p values; those `behind` measured better than the result."""
    report = reports.report(credit=credit)
    found = report["comparison"].pop("refined_vs_dense")
    report["comparison"] |= {f"refined_vs_{arm}": found | {"p_adjusted": p} for arm, p in p_values.items()}
    for arm in behind:
        report["comparison"][f"refined_vs_{arm}"]["delta"] = -0.005
    return report


TRAINING_ON, BY_CHANCE = "more training alone", "training with a random mask"


@pytest.mark.parametrize(
    ("report", "sentence"),
    [
        (credited("mask", dense=0.01), f"better than the source, and better than {TRAINING_ON}"),
        (credited("mask", dense=0.01, random=0.01), f"the source, and better than {TRAINING_ON} and {BY_CHANCE}"),
        (credited("training", dense=0.2), f"better than the source; not shown to be better than {TRAINING_ON}"),
        (credited("training", ["dense"], dense=0.2), f"better than the source; {TRAINING_ON} did as well"),
        (credited("training", ["dense"], dense=0.01), f"better than the source; {TRAINING_ON} did better"),
        (
            credited("training", ["dense"], dense=0.3, random=0.01),
            f"better than the source, and better than {BY_CHANCE}; {TRAINING_ON} did as well",
        ),
        (credited("training", dense=0.3, random=0.2), f"not shown to be better than {TRAINING_ON} and {BY_CHANCE}"),
        (credited("unknown"), "better than the source; without a control, it is not known whether the mask helped"),
    ],
)
def test_whose_doing_a_gain_is_stands_in_the_headline_s_sentence(report, sentence):
    """On the page, in the terminal and in the card; and only the mask's own gain is green."""
    page_, told = Reader(made(report)), summary(Report(report, Path("out")))
    written = card(report, SourceCard({}, ""), reports.recipe(), "import timm")
    for text in (words.headline(report), page_.text.replace("Better than", "better than"), told, written):
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
        assert "No row was gained or lost: 1,000 rows are too few" in text
    report["comparison"]["refined_vs_baseline"] = reports.comparison(0.0, -0.02, 0.02, 1.0, 9, 9)
    assert "These rows do not show how many would decide." in made(report)


@pytest.mark.parametrize(
    ("p", "adjusted", "interval", "said"),
    [
        (0.01, 0.02, (-0.001, 0.04), "The interval contains 0, but p decides the verdict."),
        (0.03, 0.06, (0.001, 0.04), "p decides the verdict, and p, adjusted for all comparisons, is not below 0.05"),
        (0.06, 0.12, (0.001, 0.04), "p decides the verdict, and p is not below 0.05"),
        (0.01, 0.02, (0.001, 0.04), None),
        (0.3, 0.6, (-0.001, 0.04), None),
    ],
)
def test_where_p_and_interval_differ_it_is_said_which_decides(p, adjusted, interval, said):
    report = reports.report(credit="training")
    report["comparison"]["refined_vs_baseline"] |= {"p_value": p, "p_adjusted": adjusted, "ci95": list(interval)}
    for text in (made(report), summary(Report(report, Path("out")))):
        assert "p decides the verdict" in text if said else "p decides the verdict" not in text
        assert said is None or said in text


@pytest.mark.parametrize(
    ("rule", "said"), [("not-worse", "even if only by chance"), ("non-inferior", "less than the margin below")]
)
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
    text = made(reports.loss_report(), log=reports.log(("refined",), looks=0), pictures={}, means=None, rows=None)
    reader = Reader(text)
    harmless(reader)
    ids = [attrs["id"] for attrs in reader.all("section")]
    assert ids == [name for name in SECTIONS if name not in ("flips", "examples", "weights")]
    for said in ("None", "nan", "undefined"):
        assert said not in reader.text
    assert "a decrease is a positive difference" in reader.text
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
    assert "92.00 % ± 0.40" in text
    assert "Mean over 3 seeds" in text
    assert "12 tries in all" in text
    assert "refined try 4, dense try 1" in text


def test_equal_inputs_give_equal_bytes():
    one, two = (made(log=iter(reports.log())) for _ in range(2))
    assert one == two
    assert json.loads(json.dumps(reports.report())) == reports.report()


# ---------------------------------------------------------------- the headline, in a reader's units


def compared(delta, gained=None, lost=None, p=0.001, **changes):
    """A report with this difference to the source."""
    report = reports.report(**changes)
    report["comparison"]["refined_vs_baseline"] = reports.comparison(delta, delta - 0.01, delta + 0.01, p, gained, lost)
    return report


def measured_as(metric, before, after, higher=False):
    arms = {"baseline": {metric: before}, "refined": {metric: after}, "dense": {metric: before}}
    return compared(before - after, arms=arms, metric={"name": metric, "higher_is_better": higher})


@pytest.mark.parametrize(
    ("report", "said"),
    [
        (compared(0.03, 30, 0), "accuracy 90.00 % → 93.00 %, 30 more of 1,000 right, none lost"),
        (compared(0.03, 40, 10), "30 more of 1,000 right (40 gained, 10 lost)"),
        (compared(-0.03, 0, 30), "30 fewer of 1,000 right, none gained"),
        (compared(0.0, 7, 7), "7 of 1,000 rows gained and as many lost"),
        (compared(0.0, 0, 0), "the same 1,000 rows right and wrong"),
        (measured_as("loss", 3.2, 3.136), "loss 3.2000 → 3.1360, 2 % lower"),
        (measured_as("loss", 2.0, 3.0), "loss 2.0000 → 3.0000, 50 % higher"),
        (measured_as("loss", 0.0, 0.0), "no change"),
        (measured_as("wer", 0.123, 0.111), "word error rate 12.30 % → 11.10 %, 1.20 points lower"),
        (measured_as("bleu4", 0.312, 0.32, higher=True), "BLEU-4 31.20 → 32.00, 0.80 points higher"),
    ],
)
def test_the_change_is_said_in_a_reader_s_units(report, said):
    assert said in words.change(report)
    assert words.amount(report) in Reader(made(report)).text


def test_numbers_on_the_page_are_those_of_the_report(finished):
    report = json.loads((finished / "dsd/report.json").read_text())
    text = " ".join(Reader((finished / "dsd/report.html").read_text()).text.replace("\u2212", "-").split())
    for found in report["arms"].values():
        assert f"{100 * found['accuracy']:.2f} %" in text
        assert f"{found['loss']:.4f}" in text
    for found in report["comparison"].values():
        for number in (found["delta"], *found["ci95"]):
            shown = f"{100 * number:+.2f}"
            assert ("0.00" if float(shown) == 0 else shown) in text
    assert f"{report['data']['eval']['rows']:,}" in text
    assert f"{report['cost']['samples']:,}" in text


def with_controls(verdict, credit_, gate=True, warnings=(), rows=None, **controls):
    """A report with p and delta of each control."""
    report = reports.report(verdict=verdict, credit=credit_, warnings=list(warnings), rows_to_decide=rows)
    report["gate"] = {"rule": "beats-control", "passed": gate}
    found = report["comparison"].pop("refined_vs_dense")
    report["comparison"] |= {f"refined_vs_{arm}": found | {"p_adjusted": p, "delta": d} for arm, (p, d) in controls.items()}
    return report


RISING = rising_warnings("refined", [0.5] * 5 + [9.0] * 30, 0.5)


@pytest.mark.parametrize(
    ("report", "said"),
    [
        (with_controls("better", "mask", dense=(0.01, 0.02)), "Use it: it is better than the source and than every control"),
        (with_controls("better", "training", dense=(0.5, 0.0)), "which training without this mask may give as well"),
        (with_controls("better", "training", gate=False, dense=(0.5, 0.0)), "--gate beats-control was not met"),
        (with_controls("better", "training", dense=(0.01, -0.02)), "Train without this mask instead"),
        (with_controls("better", "unknown"), "--control dense would show"),
        (with_controls("same", "none", dense=(0.5, 0.0)), "Keep the source, unless"),
        (with_controls("worse", "none", dense=(0.5, 0.0)), "Keep the source; training has made it worse"),
        (with_controls("worse", "none", warnings=RISING, dense=(0.5, 0.0)), "lower the rate (--lr)"),
        (with_controls("worse", "none", warnings=["Try less augmentation (--set augment.crop=none)"]), "less augmentation"),
        (with_controls("inconclusive", "none", rows=5400, dense=(0.5, 0.0)), "about 4,400 more evaluation rows (5,400 in all)"),
        (with_controls("inconclusive", "none", rows=400, dense=(0.5, 0.0)), "these do not show how many"),
        (with_controls("inconclusive", "none", dense=(0.5, 0.0)), "these do not show how many"),
    ],
)
def test_what_next_follows_from_the_evidence(report, said):
    """One sentence; the result is recommended for a shown gain alone."""
    found = words.what_next(report)
    assert said in found
    assert found.count(".") == 1
    assert found.startswith("Use it") <= (report["verdict"] == "better" and report["gate"]["passed"])
    assert found in " ".join(Reader(made(report)).text.split())


def test_a_source_that_only_guesses_is_spoken_of_first(command, tmp_path):
    """The warning is that of a real run: by chance alone a random net gets as many right."""
    builders.timm_checkpoint(tmp_path / "net", seed=5)
    builders.image_folder(tmp_path / "pictures")
    done = command(
        tmp_path / "net", "--data", tmp_path / "pictures", "-o", tmp_path / "out", *SHORT, "--control", "none", "--gate", "none"
    )
    assert done.code == 0
    report = json.loads((tmp_path / "out/dsd/report.json").read_text())
    assert any(words.AT_CHANCE in warning for warning in report["warnings"])
    assert words.what_next(report).startswith("Read the warning about the source first")


@pytest.mark.parametrize("verdict", ["worse", "same", "inconclusive"])
def test_a_headline_without_a_gain_says_how_it_stands_to_the_controls(verdict):
    for p, delta, said in ((0.01, 0.02, "better than more training"), (0.01, -0.02, "worse than more training")):
        headline = words.headline(with_controls(verdict, "none", dense=(p, delta)))
        assert headline.startswith(words.WORDS[verdict])
        assert said in headline
    headline = words.headline(with_controls(verdict, "none", dense=(0.5, 0.02), random=(0.01, -0.02)))
    assert "no clear difference" in headline
    assert "worse than training with a random mask" in headline
    assert "better" not in headline


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
        rows=rows_of(reports.predictions(text=text.encode("utf-8", "replace").decode())),
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


@example([0.0, 5e-324], 0.0)
@given(st.lists(st.floats(-1e9, 1e9, allow_nan=False), max_size=5), st.floats(0, 1))
def test_ticks_are_round_and_lie_on_the_axis(values, pad):
    scale = figures.Scale.over(values, pad)
    assert scale.low < scale.high
    ticks = scale.ticks()
    assert 1 <= len(ticks) <= 7
    assert all(-0.1 <= tick.position <= figures.SIZE + 0.1 for tick in ticks)
    assert all(-1e-6 <= scale.position(v) <= figures.SIZE * (1 + 1e-9) for v in values)


@given(st.floats(1e-9, 1e6), st.floats(1.0, 1e12))
def test_ticks_of_a_logarithmic_axis(low, ratio):
    scale = figures.Scale.over([low, low * ratio], 0.04, log=True)
    assert len(scale.ticks()) <= 5
    assert all(-0.1 <= tick.position <= figures.SIZE + 0.1 for tick in scale.ticks())


def test_the_margin_of_a_loss_is_a_share_of_the_source_s():
    assert absolute_margin(0.005, "accuracy", 0.9) == 0.005
    assert absolute_margin(0.005, "loss", 3.2) == pytest.approx(0.016)
    assert "(±0.016)" in page(reports.loss_report(), [], {}, "margin: 0.005\n")


def test_intervals_stand_where_their_numbers_are():
    found = figures.forest(reports.report()["comparison"], 0.005)
    first, second = found.rows
    assert first.low < first.point < first.high
    assert found.zero < first.low  # all of it is right of 0
    assert second.low < found.zero < second.high
    assert found.margin[1] - found.zero == pytest.approx(found.zero - found.margin[0])
    assert (first.point - found.zero) / (found.margin[1] - found.zero) == pytest.approx(0.03 / 0.005)


def test_the_holdout_s_curve_begins_at_the_source_and_shows_every_evaluation():
    """The source is a level line too; the epoch that was chosen is ringed."""
    log = reports.log(looks=5)
    looks = [line for line in log if line["event"] == "evaluation" and line["part"] == "holdout"]
    for line in looks:
        line["epoch"] = line["step"] / 8
    found = figures.curves(figures.read_log(log), "accuracy", True, {"accuracy": 0.88, "loss": 1.0}, epoch=4)
    refined, _, source = found.panels[1].curves
    assert refined.dots.count("M") == 1 + len(looks) / 2
    assert refined.dots.startswith(source.bold.split("L")[0] + "h0")
    heights = [float(point.split()[1]) for point in source.bold.removeprefix("M").split("L")]
    assert heights[0] == heights[1]
    assert refined.ring.count("M") == 1
    assert refined.ring in refined.dots
    assert figures.curves(figures.read_log(log), "accuracy", True).panels[1].curves[0].ring == ""


def test_the_three_layers_that_changed_most_are_shown_the_rest_is_folded():
    pictures = reports.pictures(("a", "b", "c", "d", "e"))
    for name, mean in zip("abcde", (0.04, 0.05, 0.06, 0.051, 0.09), strict=True):
        pictures[name][-1]["mean_abs"] = mean
    shown, rest = figures.histograms(pictures)
    assert [layer.name for layer in shown] == ["a", "c", "e"]
    assert [layer.name for layer in rest] == ["b", "d"]
    text = made(pictures=pictures)
    assert text.index("<code>e</code>") < text.index("2 more layers") < text.index("<code>b</code>")
    assert "Of the 5 recorded layers, those whose mean |w| changed most" in Reader(text).text


def test_controls_share_the_axis_and_phases_are_told_apart():
    found = figures.curves(figures.read_log(reports.log()), "accuracy", True)
    assert [phase.name for phase in found.phases] == ["1 sparse", "2 dense"]
    assert [(phase.start, phase.end) for phase in found.phases] == [(0, 500), (500, 1000)]
    assert [panel.title for panel in found.panels] == ["training loss", "holdout accuracy, %", "learning rate"]
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
    (found,), _ = figures.histograms(reports.pictures())
    start, pruned = found.moments[:2]
    assert (start.spike, start.above, start.zero_share) == ("", None, 0)
    assert pruned.spike
    assert pruned.above == pruned.zero_share > 0.1
    assert start.area != pruned.area
    assert [one.moment for one in found.moments] == list(histograms.MOMENTS)


# ---------------------------------------------------------------- the weights at five moments

ALL = torch.tensor([], dtype=torch.long)


def whole(name, *shape, excluded=None):
    return Layer(name, shape, (TensorSlice(name, ALL, ALL),), 1, excluded)


def test_a_picture_counts_every_weight():
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(50, 40, generator=generator)
    layer, start = whole("a", 50, 40), histograms.weight_histogram(whole("a", 50, 40), {"a": weights}, "start")
    assert sum(start["counts"]) == 2000
    assert (start["zeros"], len(start["counts"])) == (0, histograms.BINS)
    low, high = start["edges"]
    assert low == -high
    assert (weights.abs() <= high).float().mean() == pytest.approx(histograms.INSIDE, abs=0.001)
    inner = torch.histc(
        weights, histograms.BINS - 2, low + (high - low) / histograms.BINS, high - (high - low) / histograms.BINS
    )
    assert torch.tensor(start["counts"][1:-1]).sub(inner).abs().max() <= 1  # rounding at the edges of bins
    pruned = weights.clone().reshape(-1)
    pruned[pruned.abs().argsort()[:600]] = 0
    found = histograms.weight_histogram(layer, {"a": pruned.reshape(50, 40)}, "pruned", start["edges"])
    assert (found["zeros"], sum(found["counts"])) == (600, 1400)
    assert found["counts"][histograms.BINS // 2] == 0  # nothing is left beside 0
    assert found["mean_abs"] == pytest.approx(float(pruned.abs().mean()), rel=1e-5)
    assert json.loads(json.dumps(found)) == found


def test_a_layer_s_own_elements_are_counted_wherever_they_are():
    """A fused tensor of the file that the model holds in two parameters, one of them shared with another layer."""
    parameters = {"q": torch.arange(1.0, 7.0).reshape(2, 3), "kv": torch.arange(10.0, 16.0)}
    layer = Layer(
        "qk", (9,), (TensorSlice("q", torch.arange(6), torch.arange(6)), TensorSlice("kv", torch.arange(6, 9), torch.arange(3)))
    )
    found = histograms.weight_histogram(layer, parameters, "start")
    assert sum(found["counts"]) == 9
    expected = float(torch.cat([parameters["q"].reshape(-1), parameters["kv"][:3]]).mean())
    assert found["mean_abs"] == pytest.approx(expected)
    assert histograms.mean_abs([layer, whole("kv", 6)], parameters) == {
        "qk": pytest.approx(expected),
        "kv": pytest.approx(float(parameters["kv"].mean())),
    }


@pytest.mark.parametrize("values", [torch.zeros(8), torch.tensor([3.0]), torch.full((5,), -2.0), torch.ones(4, 4, 2, 2).half()])
def test_odd_layers_have_pictures(values):
    found = histograms.weight_histogram(whole("a", *values.shape), {"a": values.contiguous()}, "start")
    assert sum(found["counts"]) + found["zeros"] == values.numel()
    assert found["edges"][0] < found["edges"][1]


def test_memory_order_changes_nothing():
    weights = torch.randn(8, 4, 3, 3)
    plain, last = (
        histograms.weight_histogram(whole("a", 8, 4, 3, 3), {"a": w}, "start")
        for w in (weights, weights.to(memory_format=torch.channels_last))
    )
    assert plain["counts"] == last["counts"]
    assert plain["mean_abs"] == pytest.approx(last["mean_abs"], rel=1e-6)


def test_pictures_taken_again_replace_and_keep_the_edges():
    layer, book = whole("a", 100), {}
    values = {"a": torch.randn(100)}
    histograms.record(book, [layer], values, "start")
    edges = book["a"][0]["edges"]
    values["a"] *= 3
    for moment in ("pruned", "after S", "pruned"):
        histograms.record(book, [layer], values, moment)
    assert [one["moment"] for one in book["a"]] == ["start", "after S", "pruned"]
    assert all(one["edges"] == edges for one in book["a"])
    assert all(sum(one["counts"]) == 100 for one in book["a"])
    assert json.loads(json.dumps(book)) == book


def test_chosen_layers_are_spread_over_the_depth_and_large():
    layers = [whole(f"l.{i}.{kind}", size) for i in (10, 11, 2, 3, 4, 5) for kind, size in (("a", 10), ("b", 20), ("c", 15))]
    layers.append(whole("huge", 10_000, excluded="embedding"))
    order = sorted((layer.name for layer in layers), key=lambda name: [int(p) if p.isdecimal() else 0 for p in name.split(".")])
    chosen = histograms.choose_layers(layers, dict.fromkeys(order, torch.zeros(1)))
    assert len(chosen) == histograms.MOST_LAYERS
    assert all(layer.name.endswith(".b") for layer in chosen)
    depth = [int(layer.name.split(".")[1]) for layer in chosen]
    assert depth == sorted(depth)
    assert (depth[0], depth[-1] >= 10) == (2, True)
    assert [layer.name for layer in histograms.choose_layers(layers[:2], dict.fromkeys(order, torch.zeros(1)))] == [
        "l.10.a",
        "l.10.b",
    ]
    assert histograms.choose_layers(layers[-1:], {"huge": torch.zeros(1)}) == []


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
    assert len(cells) == len(histograms.MOMENTS) * histograms.MOST_LAYERS
    assert all(moment in reader.text for moment in histograms.MOMENTS)
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


CONTRASTS = """
    const parts = text => text.match(/[\\d.]+/g).map(Number);
    const over = (top, under) => top.length < 4 ? top : [0, 1, 2].map(i => top[3] * top[i] + (1 - top[3]) * under[i]);
    const light = colour => { const [r, g, b] = colour.map(v => v / 255).map(v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
        return .2126 * r + .7152 * g + .0722 * b; };
    const ground = e => { const mine = parts(getComputedStyle(e).backgroundColor);
        return mine.length < 4 ? mine : over(mine, e.parentElement ? ground(e.parentElement) : [255, 255, 255]); };
    document.querySelectorAll('details').forEach(e => e.open = true);
    const found = [];
    for (const e of document.querySelectorAll('main *')) {
        if (![...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim())) continue;
        const below = ground(e), [a, b] = [light(over(parts(getComputedStyle(e).color), below)), light(below)];
        const ratio = (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
        if (ratio < 4.5) found.push(`${e.tagName}.${e.className} ${e.textContent.trim().slice(0, 30)} ${ratio.toFixed(2)}`);
    }
    return [document.querySelectorAll('main *').length, [...new Set(found)]];
"""


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("verdict", ["better", "mask", "worse", "same", "inconclusive"])
def test_every_text_has_enough_contrast(chromium, tmp_path, verdict, dark):
    """4.5 to 1, as WCAG's AA asks, also in what is folded."""
    report = reports.report(verdict="better" if verdict == "mask" else verdict, warnings=["w"])
    report["credit"] = "mask" if verdict == "mask" else "training"
    (tmp_path / "report.html").write_text(made(report, pictures=reports.pictures(("a", "b", "c", "d"))))
    with browser.served(tmp_path) as (address, _):
        chromium.open(f"{address}/report.html", 1280, dark=dark)
        elements, faint = chromium.run(CONTRASTS)
        assert elements > 100
        assert faint == []
        ground = chromium.run("return getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", ground))) < 150) == dark


def screenshots(place):
    """Where pictures go: DSD_SCREENSHOTS if it is set, so that they can be looked at."""
    folder = Path(os.environ.get("DSD_SCREENSHOTS") or place / "screenshots")
    folder.mkdir(parents=True, exist_ok=True)
    return folder
