"""`normformer report`: its numbers against values worked out by hand, its page, and what it says to bad input."""
import importlib.util
import json
import math
import os
import pathlib
import re
import sys
import tempfile
import unittest
import xml.etree.ElementTree

from program import ROOT, run

PYTHON = os.environ.get("NORMFORMER_PYTHON", "/usr/bin/python3")
if not importlib.util.find_spec("numpy") and os.path.exists(PYTHON) and sys.executable != PYTHON:
    os.execv(PYTHON, [PYTHON, "-B", *sys.argv])  # the Python that draws reports

HAS_ALL = all(importlib.util.find_spec(module) for module in ("numpy", "matplotlib"))
SECTIONS = ["configurations", "curves", "speed", "gradients", "scales", "stability", "throughput"]
if HAS_ALL:
    sys.dont_write_bytecode = True
    sys.path.insert(0, str(ROOT / "launch"))
    import numpy
    from report import figures, measures, runs


def write_run(folder, seed=1, norms=False, perplexities=(100.0, 50.0, 25.0), extra=(), statistics=()):
    """A run of 3 x 10 updates with a validation every 10; 10 tokens and one second an update."""
    folder.mkdir(parents=True)
    switch = str(norms).lower()
    (folder / "config.toml").write_text(
        f'[model]\nlayers = 2\nhead_scale = "{"paper" if norms else "none"}"\npost_attention_norm = {switch}\n'
        f'ffn_norm = {switch}\n[train]\nupdates = 30\nseed = {seed}\n[checkpoint]\nfolder = "{folder}"\n')
    lines = []
    for update in range(1, 31):
        at = {"time": 1000.0 + update, "elapsed": float(update), "batch": update, "update": update, "tokens": 10 * update}
        lines.append({"kind": "step", **at, "loss": 5 - 0.1 * update, "gradient_norm": 1.0, "lr": 1e-3, "skipped": False,
                      "tokens_per_second": 10.0, "flops_per_second": 70.0})
        if update % 10 == 0:
            value = perplexities[update // 10 - 1]
            lines.append({"kind": "validation", **at, "loss": math.log(value), "perplexity": value, "peak_memory": 2000})
    text = "".join(json.dumps(line) + "\n" for line in [*lines, *extra])
    (folder / "metrics.jsonl").write_text(text + '{"kind":"step","ba')
    if statistics:
        (folder / "statistics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in statistics) + '{"torn')
    return folder


def gradients(update, norms):
    return {"kind": "gradients", "batch": update, "update": update, "tokens": 10 * update,
            "parameters": {f"decoder.layers.{i}.fc2.weight": {"l1": norm, "l2": 1.0} for i, norm in enumerate(norms)}}


def distributions(update, median):
    values = {"count": 4, "min": 0.0, "p5": 0.1, "p25": 0.2, "p50": median, "p75": 0.8, "p95": 0.9, "max": 1.0,
              "mean": 0.5, "std": 0.3, "bins": [0.0, 0.5, 1.0], "counts": [2, 2]}
    return {"kind": "distributions", "batch": update, "update": update, "tokens": 10 * update,
            "parameters": {f"decoder.layers.{i}.ffn_layernorm.weight": values for i in range(2)}}


class WithFolder(unittest.TestCase):
    def setUp(self):
        holder = tempfile.TemporaryDirectory(prefix="normformer_report_")
        self.addCleanup(holder.cleanup)
        self.folder = pathlib.Path(holder.name)


@unittest.skipUnless(HAS_ALL, "numpy and matplotlib are not installed (apt-get install python3-matplotlib)")
class Numbers(WithFolder):
    def test_speed_is_read_between_validations_in_the_logarithm(self):
        run_ = runs.read_run(write_run(self.folder / "a"))
        # From 50 to 25 in 10 updates: half way, in the logarithm, at 25 * sqrt(2).
        reached = measures.reach(run_.perplexity(), 25 * math.sqrt(2), run_.flops_per_token)
        self.assertAlmostEqual(reached.updates, 25.0)
        self.assertAlmostEqual(reached.tokens, 250.0)
        self.assertAlmostEqual(reached.flops, 1750.0)
        self.assertAlmostEqual(reached.seconds, 25.0)
        self.assertIsNone(measures.reach(run_.perplexity(), 24.9))
        self.assertEqual(measures.reach(run_.perplexity(), 200.0).updates, 10.0)  # the first validation

    def test_a_normformer_is_measured_by_the_mean_of_the_baselines_seeds(self):
        for seed, last in ((1, 24.0), (2, 26.0)):
            write_run(self.folder / f"base-{seed}", seed, perplexities=(100.0, 50.0, last))
        write_run(self.folder / "norm", norms=True, perplexities=(50.0, 25.0, 20.0))
        groups = measures.group_runs(runs.find_runs([self.folder]))
        self.assertEqual([(group.label, len(group.runs)) for group in groups], [("Pre-LN baseline", 2), ("NormFormer", 1)])
        ((target, owner),) = targets = measures.targets_of(groups, None)
        self.assertAlmostEqual(target, 25.0)
        self.assertIs(owner, groups[0])
        (rows,) = measures.speed_rows(groups, targets)
        parts = [measures.part_of(reached, whole, "updates") for _, reached, whole in rows]
        self.assertAlmostEqual(parts[0], 100.0)
        self.assertAlmostEqual(parts[1], 100 * 20 / 30)

    def test_a_post_ln_model_is_no_baseline(self):
        write_run(self.folder / "pre")
        for name, norms in (("post", False), ("post-norm", True)):
            path = write_run(self.folder / name, norms=norms) / "config.toml"
            path.write_text(path.read_text().replace("[model]\n", '[model]\nnorm_position = "post"\n'))
        groups = measures.group_runs(runs.find_runs([self.folder]))
        self.assertEqual([(group.label, group.is_baseline) for group in groups],
                         [("Pre-LN baseline", True), ("Post-LN", False), ("Post-LN NormFormer", False)])
        self.assertEqual([owner.label for _, owner in measures.targets_of(groups, None)], ["Pre-LN baseline"])
        self.assertEqual(measures.model_name({"model.norm_position": "post", "model.head_scale": "paper"}),
                         "Post-LN + head scale")

    def test_seeds_have_a_mean_and_a_spread_where_all_have_a_value(self):
        column = lambda *values: numpy.array(values, dtype=float)  # noqa: E731
        one = runs.Curve(column(1, 2, 3), column(10, 20, 30), column(1, 2, 3), column(5, 4, 3))
        two = runs.Curve(column(2, 3, 4), column(20, 30, 40), column(4, 6, 8), column(2, 1, 0))
        mean, low, high = measures.mean_curve([one, two])
        self.assertEqual([list(x) for x in (mean.update, mean.seconds, mean.value, low, high)],
                         [[2, 3], [3, 4.5], [3, 2], [2, 1], [4, 3]])

    def test_runs_that_differ_in_a_rate_are_told_apart(self):
        for rate in ("0.1", "0.2"):
            path = write_run(self.folder / rate) / "config.toml"
            path.write_text(path.read_text() + f"[optimizer]\nlr = {rate}\n")
        groups = measures.group_runs(runs.find_runs([self.folder]))
        self.assertEqual([group.label for group in groups], ["Pre-LN baseline, lr 0.1", "Pre-LN baseline, lr 0.2"])

    def test_layers_are_compared_by_the_largest_over_the_smallest(self):
        for seed, norms in ((1, (4.0, 2.0)), (2, (8.0, 2.0))):
            write_run(self.folder / str(seed), seed, statistics=[gradients(10, norms), gradients(2000, (1.0, 1.0))])
        (group,) = measures.group_runs(runs.find_runs([self.folder]))
        updates, norms = measures.mean_layer_norms(group, 1000)
        self.assertEqual(list(updates), [10])
        self.assertEqual({layer: list(values) for layer, values in norms.items()}, {0: [6.0], 1: [2.0]})
        self.assertEqual(list(measures.layer_ratio(norms)), [3.0])

    def test_scales_are_those_of_the_last_record(self):
        run_ = runs.read_run(write_run(self.folder / "a", statistics=[distributions(10, 0.4), distributions(20, 0.5)]))
        self.assertEqual([(layer, values["p50"]) for layer, values in measures.last_scales(run_, "ffn_layernorm.weight")],
                         [(0, 0.5), (1, 0.5)])

    def test_explosions_have_their_median_over_seeds(self):
        for seed, update in ((1, 9), (2, 31), (3, 12)):
            write_run(self.folder / str(seed), seed,
                      extra=[{"kind": "explosion", "update": update, "lr": update * 5e-5, "reason": "loss"}])
        (group,) = measures.group_runs(runs.find_runs([self.folder]))
        ends = measures.stability_ends(group)
        self.assertEqual([measures.stable_until(ends, name) for name in ("update", "lr")], [(12, False), (12 * 5e-5, False)])
        self.assertEqual(group.runs[0].state, "exploded at update 9")

    def test_a_run_that_lasted_counts_as_infinitely_stable(self):
        exploded = [{"kind": "explosion", "update": 20, "lr": 5e-4, "reason": "loss"}]
        for seed, extra in enumerate(((), exploded, ()), 1):
            path = write_run(self.folder / str(seed), seed, extra=extra) / "config.toml"
            path.write_text(path.read_text() + "[health]\nexplosion_rise = 1.0\n")
        (group,) = measures.group_runs(runs.find_runs([self.folder]))
        ends = measures.stability_ends(group)
        self.assertEqual([(end.update, end.lr, end.exploded) for end in ends],
                         [(30, 1e-3, False), (20, 5e-4, True), (30, 1e-3, False)])
        self.assertEqual([measures.stable_until(ends, name) for name in ("update", "lr")], [(30, True), (1e-3, True)])
        self.assertEqual(measures.stable_until(ends[:2] + ends[1:2], "update"), (20, False))
        self.assertEqual(measures.stable_until([], "lr"), (None, False))
        # A run that goes on has not lasted, and one that was to end at its updates is no stability test.
        path = self.folder / "1" / "config.toml"
        path.write_text(path.read_text().replace("updates = 30", "updates = 40"))
        self.assertIsNone(measures.end_of_test(runs.read_run(self.folder / "1")))
        self.assertIsNone(measures.end_of_test(runs.read_run(write_run(self.folder / "plain"))))

    def test_what_a_rollback_took_back_does_not_count(self):
        back = {"kind": "rollback", "batch": 31, "update": 15, "tokens": 150, "from_update": 30}
        run_ = runs.read_run(write_run(self.folder / "a", extra=[back]))
        self.assertEqual(run_.updates, 15)
        self.assertEqual(list(run_.perplexity().update), [10])
        self.assertEqual(run_.state, "15 of 30 updates")

    def test_time_without_a_record_of_it_leaves_pauses_out(self):
        folder = write_run(self.folder / "a")
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()[:-1]]
        for line in lines:
            del line["elapsed"]
            line["time"] += 5000.0 * (line["batch"] > 12)
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        seconds = runs.read_run(folder).loss().seconds
        self.assertEqual((seconds[0], seconds[11], seconds[12], seconds[-1]), (0.0, 11.0, 11.0, 28.0))

    def test_smoothing_keeps_a_constant_and_the_mean_of_neighbours(self):
        self.assertEqual(list(measures.smooth(numpy.full(5, 2.0), 3)), [2.0] * 5)
        self.assertEqual(list(measures.smooth(numpy.array([0.0, 3.0, 6.0]), 3)), [1.5, 3.0, 4.5])

    def test_labels_that_would_touch_are_moved_apart_about_their_middle(self):
        self.assertEqual(figures.spread([0.0, 10.0], 1.0), [0.0, 10.0])
        self.assertEqual(figures.spread([4.0, 4.0, 10.0], 2.0), [3.0, 5.0, 10.0])


@unittest.skipUnless(HAS_ALL, "numpy and matplotlib are not installed (apt-get install python3-matplotlib)")
class Page(WithFolder):
    def report(self, *words, expect=0):
        return run(["report", *words, "--output", self.folder / "out"], expect=expect)

    def page(self):
        return (self.folder / "out" / "index.html").read_text()

    def check(self, page):
        """Well-formed, complete, every reference within the page."""
        tree = xml.etree.ElementTree.fromstring(page)
        self.assertEqual([part.get("id") for part in tree.iter("section")], SECTIONS)
        ids = [part.get("id") for part in tree.iter() if part.get("id")]
        self.assertEqual(len(ids), len(set(ids)))
        for part in tree.iter():
            for key, value in part.attrib.items():
                if key in ("src", "href") or key.endswith("}href"):
                    self.assertRegex(value, "^#")
                    self.assertIn(value[1:], ids)
        for target in re.findall(r"url\(([^)]*)\)", page):
            self.assertIn(target.removeprefix("#"), ids)
        self.assertNotRegex(page, r"<(script|link|img|iframe)|@import")

    def test_everything_is_drawn_and_twice_the_same(self):
        statistics = [gradients(10, (4.0, 2.0)), gradients(20, (3.0, 2.0)), distributions(20, 0.5)]
        exploded = [{"kind": "explosion", "update": 30, "lr": 0.1, "reason": "loss"}]
        write_run(self.folder / "runs" / "base", statistics=statistics)
        write_run(self.folder / "runs" / "norm", norms=True, perplexities=(40.0, 20.0, 10.0), statistics=statistics,
                  extra=exploded)
        written = []
        for _ in range(2):
            self.report(self.folder / "runs")
            written.append({file.name: file.read_bytes() for file in (self.folder / "out").iterdir()})
        self.assertEqual(written[0], written[1])
        self.assertEqual(set(written[0]), {"index.html", *(f"{name}.png" for name in (
            "training-loss", "validation-perplexity", "speed-1", "gradient-norms", "gradient-ratio", "learned-scales",
            "stability", "throughput"))})
        self.check(self.page())
        # From 40 to 20 in ten updates, by 25: 10 + 10 log2(40 / 25) of 30.
        self.assertIn(f"in {100 * (10 + 10 * math.log2(40 / 25)) / 30:.0f} % of the updates", self.page())

    def test_runs_that_tell_little_say_what_would_tell(self):
        path = self.folder / "empty"
        path.mkdir()
        (path / "config.toml").write_text("[train]\nupdates = 3\n")
        self.report(path)
        self.check(self.page())
        for key in ("metrics.gradient_norms_every", "metrics.distributions_every", "health.explosion_rise"):
            self.assertIn(key, self.page())

    def test_a_stability_test_in_which_nothing_exploded_has_its_row_and_picture(self):
        path = write_run(self.folder / "a") / "config.toml"
        path.write_text(path.read_text() + "[health]\nexplosion_rise = 1.0\n")
        self.report(self.folder / "a")
        self.check(self.page())
        self.assertTrue((self.folder / "out" / "stability.png").exists())
        section = self.page().partition('<section id="stability"')[2].partition("</section>")[0]
        self.assertEqual(re.findall(r"<td[^>]*>([^<]*)</td>", section), ["0 of 1", "1", "0", "over 30", "over 0.001"])

    def test_seeds_that_share_no_update_are_drawn_without_a_mean(self):
        for seed, parity in ((1, 0), (2, 1)):
            path = write_run(self.folder / "runs" / str(seed), seed) / "metrics.jsonl"
            lines = [json.loads(line) for line in path.read_text().splitlines()[:-1]]
            path.write_text("".join(json.dumps(line) + "\n" for line in lines
                                    if line["kind"] == "step" and line["update"] % 2 == parity))
        self.report(self.folder / "runs")
        self.check(self.page())
        self.assertTrue((self.folder / "out" / "training-loss.png").exists())
        self.assertEqual(list(measures.smooth(numpy.array([]), 3)), [])

    def test_names_and_a_target_are_taken(self):
        for name in ("a", "b"):
            write_run(self.folder / name)
        self.report(self.folder / "a", self.folder / "b", "--names", "one &amp; <two>,other", "--target-perplexity", "50")
        self.check(self.page())
        self.assertIn("one &amp;amp; &lt;two&gt;", self.page())
        self.assertIn("Validation perplexity 50", self.page())

    def test_bad_input_is_one_sentence(self):
        no_toml = self.folder / "bad"
        no_toml.mkdir()
        (no_toml / "config.toml").write_text("[train\n")
        good = write_run(self.folder / "good")
        for words, code, told in (([self.folder / "absent"], 65, "is no run's folder"), ([no_toml], 65, "config.toml"),
                                  ([good, "--names", "a,b"], 64, "2 names for 1 runs"),
                                  ([good, "--target-perplexity", "x"], 64, "target-perplexity"),
                                  ([good, "--target-perplexity", "0.5"], 64, "above 1")):
            outcome = self.report(*words, expect=code)
            self.assertEqual(len(outcome.err.strip().splitlines()), 1, outcome.err)
            self.assertTrue(outcome.err.startswith("normformer: "))
            self.assertIn(told, outcome.err)

    def test_what_is_missing_is_named(self):
        good = write_run(self.folder / "good")
        for name, value, told in (("NORMFORMER_REPORT", "/absent", "launch/report"),
                                  ("NORMFORMER_PYTHON", "/absent/python", "matplotlib")):
            os.environ[name] = value
            try:
                outcome = self.report(good, expect=64)
            finally:
                del os.environ[name]
            self.assertEqual(len(outcome.err.strip().splitlines()), 1)
            self.assertIn(told, outcome.err)


if __name__ == "__main__":
    unittest.main()
