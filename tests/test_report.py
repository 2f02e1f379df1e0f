"""The report: a valid page that stands alone, whatever state the run directory is in."""

from __future__ import annotations

import html.parser
import json
import re
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxllm import report, report_figures
from jaxllm.config import ConfigError, TrainConfig, to_dict
from jaxllm.metrics import Writer

EVIL = "<script>alert('x')</script>&amp;\"'"
VOID = {"meta", "link", "br", "img", "hr", "input"}


class Page(html.parser.HTMLParser):
    """Checks that every element is closed in order, and collects what the tests ask about."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict]] = []
        self.text: list[tuple[tuple[str, ...], str]] = []
        self.feed(source)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes <{self.open[-1] if self.open else ''}>"
        self.open.pop()

    def handle_data(self, data):
        self.text.append((tuple(self.open), data))

    def words(self) -> str:
        return " ".join(" ".join(data for path, data in self.text if "style" not in path).split())


def make_run(folder: Path, num_records: int = 40) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    config = {"config": to_dict(TrainConfig(num_steps=400)), "hash": "0badcafe", "name": f"run {EVIL}", "parent": "runs/before"}
    (folder / "config.json").write_text(json.dumps(config))
    with Writer(folder, tensorboard=False, active=True) as writer:
        for i in range(1, num_records + 1):
            values = {"loss": 2 + 4 / i, "tokens": 1000 * i, "lr": 1e-3, "grad_norm": 1.0, "log_z": 0.1, "tokens_per_second": 31_240.0}
            writer.write(10 * i, values | {"mfu": 0.412, "hfu": 0.5, "total/ce": 2.0, "total-ce": 2.0, "bad": float("nan")})
        writer.write(400, {"loss": 2.5, "bits_per_byte": 2.4}, kind="eval")
        writer.event(200, "spike", f"rewound {EVIL}")
    cut = [{"step": step, "kind": "train", "loss": 9.0} for step in (210, 220)]
    (folder / "metrics.cut-1.jsonl").write_text("".join(json.dumps(c) + "\n" for c in cut))
    baselines = [{"name": "byte unigram", "bits_per_byte": 4.8, "note": EVIL}, {"name": "lzma, whole", "bits_per_byte": 1.6}]
    results = {"bits_per_byte": 2.34, "baselines": baselines, "num_params": 5_900_000, "tokens_seen": 12_288_000, "wall_seconds": 130.0}
    (folder / "results.json").write_text(json.dumps(results | {"go_on": f"jaxllm train x.py {EVIL}"}))
    samples = [
        {"step": 100, "prompt": "early", "completion": "e"},
        {"step": 400, "prompt": f"  def {EVIL}", "completion": "\n\tif x:\n\n    y  "},
    ]
    (folder / "samples.jsonl").write_text("".join(json.dumps(s) + "\n" for s in samples))
    (folder / "environment.json").write_text(json.dumps({"jax": "0.12", "devices": [{"kind": "cpu"}], "peak": EVIL}))
    (folder / "data.json").write_text(json.dumps({"sources": [{"path": EVIL, "bytes": 9_412_311}]}))
    for name, manifests in (("00000300", ("0-of-2", "1-of-2")), ("00000400", ("0-of-2",)), ("corrupt-00000200", ())):
        (folder / "checkpoints" / name).mkdir(parents=True, exist_ok=True)
        for manifest in manifests:
            (folder / "checkpoints" / name / f"manifest-{manifest}.json").write_bytes(b"x" * 1024)
    (folder / "checkpoints" / "corrupt-00000200" / "arrays").write_bytes(b"x" * 10)
    return folder


def render(folder: Path) -> Page:
    return Page(report.write_report(folder).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def full(tmp_path_factory) -> Page:
    return render(make_run(tmp_path_factory.mktemp("run")))


# ---------------------------------------------------------------------------------- a page that stands alone


def test_it_fetches_and_runs_nothing(full):
    tags = {tag for tag, _ in full.tags}
    assert not tags & {"script", "iframe", "img", "object", "embed", "video", "audio", "source", "base"}
    for tag, attributes in full.tags:
        for name, value in attributes.items():
            assert not name.startswith("on"), f"<{tag} {name}> runs code"
            if name in ("src", "href", "xlink:href", "srcset", "action", "data"):
                assert value.startswith("#") or value == "data:,", f"<{tag} {name}={value}>"
            assert "url(" not in (value or "") or re.search(r"url\(#", value), f"<{tag} {name}={value}>"
    css = "".join(data for path, data in full.text if path[-1:] == ("style",))
    assert "url(" not in css and "@import" not in css
    assert "http" not in "".join(f"{k}={v}" for _, attributes in full.tags for k, v in attributes.items())


def test_ids_are_unique_and_every_reference_has_one(full):
    ids = [a["id"] for _, a in full.tags if "id" in a]
    assert len(ids) == len(set(ids)) > 20
    used = {m for _, a in full.tags for v in a.values() for m in re.findall(r"url\(#([^)]+)\)|^#(.+)$", v or "")}
    assert {a or b for a, b in used} <= set(ids) and used


def test_every_plot_is_there_in_the_pages_own_colours(full):
    svgs = [a["aria-label"] for tag, a in full.tags if tag == "svg"]
    assert svgs[0].startswith("Training and held-out loss")
    wanted = ["Learning rate", "Gradient norm", "Tokens per second", "Utilisation", "log Z", "total/ce", "total-ce"]
    assert svgs[1:] == [f"{name} over steps" for name in wanted]  # and none for `bad`, which has no finite value
    styles = " ".join(a.get("style") or "" for _, a in full.tags)
    assert "var(--train)" in styles and "var(--held)" in styles
    assert not set(re.findall(r"(?:fill|stroke): (#[0-9a-f]{6})", styles)), "a colour that ignores the dark theme"


def test_what_users_wrote_is_text(full):
    assert full.words().count("<script>alert('x')</script>") >= 7  # name (twice), event, note, sample, environment, data, command


def test_samples_keep_their_white_space_and_the_newest_are_open(full):
    pres = [d for path, d in full.text if path[-2:] == ("pre", "span")]
    assert pres == [f"  def {EVIL}", "\n\tif x:\n\n    y  ", "early", "e"]
    early = next(path for path, d in full.text if d == "early")
    assert "details" in early


def test_the_headline_says_what_was_beaten_and_what_was_not(full):
    words = full.words()
    assert "2.34 bits per byte" in words and "51 % fewer than byte unigram (4.80)" in words and "Still ahead: lzma, whole (1.60)" in words
    widths = [float(w) for _, a in full.tags for w in re.findall(r"^width:([\d.]+)%$", a.get("style") or "")]
    assert widths == pytest.approx([100, 100 * 2.34 / 4.8, 100 * 1.6 / 4.8], abs=0.01)
    for said in ("step 400 of 400", "config 0badcafe", "weights of runs/before", "5.9 M", "12.3 M", "2 min 10 s", "31,240", "41.2 %"):
        assert said in words


def test_events_checkpoints_and_configuration_are_listed(full):
    words = full.words()
    assert "210 cut back 2 records up to step 220 were trained again" in words
    assert "not finite train: bad" in words
    for row in ("200 10 B damaged, set aside", "300 2 KiB complete", "400 1 KiB incomplete"):
        assert row in words
    assert "layer_pattern.0.window" in words and "9,412,311" in words


# ------------------------------------------------------------------------------------- whatever is there


def test_a_folder_without_config_is_no_run(tmp_path):
    with pytest.raises(ConfigError, match=r"config\.json"):
        report.write_report(tmp_path)


def test_what_is_missing_is_said(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    words = render(tmp_path).words()
    for name in ("results.json", "environment.json", "data.json"):
        assert f"There is no {name} yet." in words
    for said in ("metrics.jsonl has 0 records", "There are no samples.", "There are no checkpoints.", "config.json has no config."):
        assert said in words
    assert tmp_path.name in words


def test_results_of_a_run_that_went_on_are_not_its_own(tmp_path):
    make_run(tmp_path)
    results = json.loads((tmp_path / "results.json").read_text())
    for steps, is_own in ((300, False), (400, True)):
        (tmp_path / "results.json").write_text(json.dumps(results | {"steps": steps}))
        words = render(tmp_path).words()
        assert ("2.34 bits per byte" in words) == is_own
        assert ("results.json is of step 300, where the run ended before it went on to 400." in words) != is_own


@pytest.mark.parametrize("name", ["config.json", "results.json", "environment.json", "data.json", "samples.jsonl", "metrics.jsonl"])
def test_a_torn_file_costs_only_its_own_part(tmp_path, name):
    make_run(tmp_path, num_records=3)
    path = tmp_path / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    words = render(tmp_path).words()
    if name.endswith(".json"):
        assert f"{name} could not be read" in words
    assert ("2.34 bits per byte" in words) == (name != "results.json")


@pytest.mark.parametrize(
    "losses", [[float("nan")] * 3, [1.0], [2.0, 2.0], [float("nan"), 3.0, float("inf"), 1e30], [1.0] + [float("nan")] * 20]
)
def test_few_constant_or_broken_losses_are_drawn(tmp_path, losses):
    (tmp_path / "config.json").write_text("{}")
    with Writer(tmp_path, tensorboard=False, active=True) as writer:
        for step, loss in enumerate(losses):
            writer.write(step, {"loss": loss, "lr": loss, "tokens": step})
        writer.write(0, {"loss": losses[-1]}, kind="eval")
    page = render(tmp_path)
    assert any(tag == "svg" for tag, _ in page.tags) == any(np.isfinite(losses))


VALUES = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.just(10**400) | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@given(values=st.lists(VALUES, min_size=12, max_size=12))
@settings(max_examples=40, deadline=None)
def test_no_json_value_breaks_the_page(values):
    """Any value in the place of any field that the page reads, without plots, which take their time."""
    names = ["bits_per_byte", "baselines", "num_params", "wall_seconds", "go_on", "generate"]
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder)
        (run / "config.json").write_text(json.dumps({"config": values[0], "name": values[1], "hash": values[2], "parent": values[3]}))
        (run / "results.json").write_text(json.dumps(dict(zip(names, values[4:10], strict=True))))
        (run / "environment.json").write_text(json.dumps(values[10]))
        (run / "data.json").write_text(json.dumps(values[11]))
        (run / "samples.jsonl").write_text(json.dumps({"step": 1, "prompt": values[1], "completion": values[3]}) + "\n")
        event = {"step": values[2], "kind": "event", "time": values[5], "event": values[3], "message": values[4], "nonfinite": values[6]}
        (run / "metrics.jsonl").write_text(json.dumps(event) + "\n" + json.dumps(event | {"step": 1}) + "\n")
        render(run)


def test_bytes_that_html_cannot_hold_become_pictures(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "samples.jsonl").write_text('{"step": 1, "prompt": "a\\u0000b", "completion": "\\u001b[31m\\ud800\\r\\n"}\n')
    raw = report.write_report(tmp_path).read_bytes()
    assert not set(raw) & (set(range(32)) - {9, 10})
    assert "a␀b" in raw.decode() and "␛[31m?␍\n" in raw.decode()


def test_an_older_report_is_replaced_in_one_step(tmp_path):
    (tmp_path / "config.json").write_text('{"name": "first"}')
    path = report.write_report(tmp_path)
    with open(path) as reader:  # somebody has it open
        (tmp_path / "config.json").write_text('{"name": "second"}')
        report.write_report(tmp_path)
        assert "first" in reader.read()
    assert "second" in path.read_text()
    assert {p.name for p in tmp_path.iterdir()} == {"config.json", "report.html"}


# ------------------------------------------------------------------------------------------ arithmetic


def test_the_running_mean_keeps_lines_and_averages_noise():
    assert report_figures._running_mean(np.full(50, 3.0)) == pytest.approx(np.full(50, 3.0))
    line = np.arange(600.0)
    smooth = report_figures._running_mean(line)
    assert smooth[:560] == pytest.approx(line[:560])  # no lag, from the first value on
    noise = np.random.default_rng(0).normal(size=6000)
    assert np.std(report_figures._running_mean(noise)[300:-300]) < 0.1
    assert report_figures._running_mean(np.array([5.0])) == pytest.approx([5.0])
    fall = 2 + 8 * np.arange(1.0, 5001) ** -0.5
    assert report_figures._running_mean(fall) == pytest.approx(fall, rel=0.02)


def test_thinning_keeps_every_spike():
    x, y = np.arange(100_000.0), np.zeros(100_000)
    y[[7, 50_003, 99_999]] = 9.0, -9.0, np.nan
    thin_x, thin_y = report_figures._thin(x, y)
    assert len(thin_x) <= 1200 and {7.0, 50_003.0} <= set(thin_x)
    assert (np.diff(thin_x) > 0).all() and thin_y.max() == 9 and thin_y.min() == -9


def test_a_step_recorded_twice_counts_as_last_written(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with Writer(tmp_path, tensorboard=False, active=True) as writer:
        for step, loss in ((2, 1.0), (1, 5.0), (2, 3.0)):
            writer.write(step, {"loss": loss})
    steps, losses = report.load(tmp_path).series("train", "loss")
    assert steps.tolist() == [1, 2] and losses.tolist() == [5, 3]
