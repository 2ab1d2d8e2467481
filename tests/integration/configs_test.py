#!/usr/bin/env python3
"""Every configuration of configs/, each run of its sweeps too, planned on the meta device: parameters as published
and as counted here, what its header says of parameters, tokens, FLOPs and memory, and whether it fits the GPUs that
it is for.

configs_test.py --write writes these lines of the headers anew, as plans are now.
"""
import functools
import itertools
import pathlib
import re
import sys
import tomllib
import unittest

from program import ROOT, run

sys.dont_write_bytecode = True
sys.path.insert(0, str(ROOT / "launch"))

from sweeps.plan import Run, flattened, read_sweep  # noqa: E402

CONFIGS = ROOT / "configs"
LAYOUTS = CONFIGS / "layouts"
GIB = 2**30

# Shleifer, Weston, Ott 2021: the baseline, NormFormer, and NormFormer with a residual scale.
PUBLISHED = {  # layers, width
    (12, 768): (124377600, 124469904, 124479120),
    (24, 1024): (354740224, 354986368, 355010944),
    (24, 2048): (1313460224, 1313952512, 1314001664),
    (32, 2560): (2648724480, 2649544704, 2649626624),
}
IN_MILLIONS = {  # as it prints them
    (12, 768): (124.4, 124.5, 124.5),
    (24, 1024): (354.7, 355.0, 355.0),
    (24, 2048): (1313.5, 1314.0, 1314.0),
    (32, 2560): (2648.7, 2649.5, 2649.6),
}
VARIANTS = {"baseline": 0, "gpt3-replica": 0, "relu2": 0, "normformer": 1, "normformer-lambda": 2, "all": 2}
SMALL, LARGE = {(12, 768), (12, 780), (24, 1024)}, {(24, 2048), (32, 2560)}
# By name: GPUs, GiB of each that a run may take (the rest is for CUDA, cuDNN, NCCL and others), models.
FOR_LAYOUTS = {
    "80gb-node": (8, 72, SMALL | LARGE),
    "commodity-small": (32, 22, SMALL),
    "commodity-large": (32, 22, LARGE),
    "one-gpu": (1, 22, SMALL),
}
OWN_GIB = 29  # the files' own layouts are for V100s with 32 GB
OF_HEADER = ("runs", "parameters", "tokens", "FLOPs", "memory")


class Planned:
    """What `normformer plan` says of a run."""

    def __init__(self, text):
        def number(pattern):
            return int(re.search(pattern, text)[1].replace(",", ""))
        self.parameters = number(r"parameters .*\(([\d,]+)\)")
        self.updates, self.tokens = number(r"training: ([\d,]+) updates"), number(r"updates take ([\d,]+) tokens")
        self.flops = re.search(r"tokens and (\S+) FLOPs of the model", text)[1]
        unit = {"GiB": GIB, "MiB": 2**20, "KiB": 2**10}[re.search(r"peak memory in (\S+)", text)[1]]
        stages = re.findall(r"^ {2,4}\d+  [\d, -]+ [\d. ]+$", text, re.M)
        self.memory = max(float(row.split()[-1]) for row in stages) * unit


@functools.cache
def plan_of(config, ranks, options):
    words = [word for option in options for word in ("--set", option)]
    return Planned(run(["plan", config, "-n", ranks, *words], expect=0).out)


def planned(a_run, ranks, vocab=None, layout=None):
    """The plan of a run. Runs that differ in nothing that plans depend on share one."""
    no_matter = ("train.seed=", "optimizer.lr=", "optimizer.beta2=", "optimizer.weight_decay=", "checkpoint.")
    options = [word for word in a_run.overrides()[1::2] if not word.startswith(no_matter)]
    if vocab is not None:
        options.append(f"model.vocab={vocab}")
    if layout is not None:
        # Memory, for which alone it is asked, depends on no other keys of sweeps.
        options = [*filter(lambda word: word.startswith("model."), options), f"@{LAYOUTS / layout}.toml"]
    return plan_of(a_run.config.resolve(), ranks, tuple(options))


class File:
    """A file of configs/ with the runs that it makes."""

    def __init__(self, path):
        self.path = path
        self.lines = path.read_text().splitlines()
        self.header = "\n".join(itertools.takewhile(lambda line: line.startswith("#"), self.lines))
        self.is_sweep = "axes" in tomllib.loads(path.read_text())
        if self.is_sweep:
            sweep = read_sweep(path)
            self.runs, self.ranks = sweep.runs, sweep.ranks
        else:
            self.runs = (Run("", {}, path, pathlib.Path("run"), {}),)
            self.ranks = int(re.search(r"(?:launch/run|mpirun) .*?-n (\d+)", self.header)[1])

    @property
    def vocab(self):
        """What a header says of the corpus' own vocabulary; None where the configuration says it."""
        path = self.runs[0].config
        said = re.search(r"^#   parameters .* with a vocabulary of (\d+)$", path.read_text(), re.M)
        return int(said[1]) if said else None

    def settings(self, a_run):
        return flattened(tomllib.loads(a_run.config.read_text())) | a_run.keys

    def shape(self):
        settings = self.settings(self.runs[0])
        return settings["model.layers"], settings["model.width"]

    def is_language_model(self):
        return self.settings(self.runs[0]).get("model.head", "language") == "language"

    @functools.cached_property
    def plans(self):
        return [planned(a_run, self.ranks, self.vocab) for a_run in self.runs]

    def layouts(self):
        """By name: GPUs, limit and the largest memory of any run."""
        return {name: (gpus, limit, max(planned(a_run, gpus, layout=name).memory for a_run in self.runs))
                for name, (gpus, limit, shapes) in FOR_LAYOUTS.items()
                if self.shape() in shapes and self.is_language_model()}

    def is_on_gpus(self):
        return self.settings(self.runs[0]).get("device.kind") == "cuda"

    def each_rank(self):
        """In words."""
        return "one rank" if self.ranks == 1 else f"each of {self.ranks} {'GPUs' if self.is_on_gpus() else 'ranks'}"

    def expected_header(self):
        """The lines that say what the file takes, without "#   "."""
        settings = self.settings(self.runs[0])
        batch = f"{settings['train.global_batch']} sequences of {settings['model.length']}"
        first, tokens = self.plans[0], sum(plan.tokens for plan in self.plans)
        at_most = "at most " if "health.explosion_rise" in settings else ""
        updates = f"{first.updates:,} updates of {batch}"
        counts = sorted({plan.parameters for plan in self.plans})
        flops = sum(float(plan.flops) for plan in self.plans)
        of_products = sum(6 * plan.parameters * plan.tokens for plan in self.plans)
        lines = [f"runs        {len(self.runs)} of {at_most}{updates}"] if self.is_sweep else []
        vocabulary = f" with a vocabulary of {self.vocab}" if self.vocab and not self.is_sweep else ""
        memory = max(plan.memory for plan in self.plans)
        return [*lines,
                "parameters  " + " to ".join(f"{n:,}" for n in dict.fromkeys((counts[0], counts[-1]))) + vocabulary,
                f"tokens      {at_most}{amount(tokens)}" + (" in all" if self.is_sweep else f": {updates}"),
                f"FLOPs       {at_most}{of_products:.2e} as 6 a parameter and token; {flops:.2e} with attention",
                f"memory      {memory_text(memory)} of {self.each_rank()}{self.memory_of_layouts()}"]

    def memory_of_layouts(self):
        layouts = self.layouts() if self.is_on_gpus() else {}
        texts = [f"{name} {memory / GIB:.1f}" + (f" of {gpus}" if gpus > 1 else "")
                 for name, (gpus, _, memory) in layouts.items()]
        return "; layouts: " + ", ".join(texts) if texts else ""

    def given_header(self):
        return [line.removeprefix("#   ") for line in self.header.splitlines() if is_of_header(line)]

    def write(self):
        """Puts the lines of the header in front of its command."""
        kept = [line for line in self.lines if not is_of_header(line)]
        at = next(number for number, line in enumerate(kept) if line.startswith("#   launch/"))
        lines = [*kept[:at], *(f"#   {line}" for line in self.expected_header()), *kept[at:]]
        self.path.write_text("\n".join(lines) + "\n")


def is_of_header(line):
    return re.match(rf"#   ({'|'.join(OF_HEADER)}) {{2,}}", line) is not None


def amount(tokens):
    return f"{tokens / 1e9:.1f} billion" if tokens >= 1e8 else f"{tokens / 1e6:.2f} million"


def memory_text(size):
    return f"{size / GIB:.1f} GiB" if size >= GIB else f"{size / 2**20:.0f} MiB"


def all_files():
    return [File(path) for path in sorted(CONFIGS.rglob("*.toml")) if path.parent != LAYOUTS]


def counted(settings, vocab):
    """Parameters of the paper's models, without the program: tied embedding, biases everywhere, what NormFormer adds to
    a layer, and RoBERTa's positions and heads."""
    d, heads, vocab = settings["model.width"], settings["model.heads"], settings.get("model.vocab") or vocab
    f = settings.get("model.ffn") or 4 * d
    layer = 4 * (d * d + d) + (d * f + f) + (f * d + d) + 2 * 2 * d
    added = {"head_scale": heads, "post_attention_norm": 2 * d, "ffn_norm": 2 * f, "residual_scale": d,
             "qkv_norm": 3 * 2 * d}
    layer += sum(n for key, n in added.items() if settings.get(f"model.{key}", "none") not in (False, "none"))
    classes = settings.get("model.classes", 2)
    of_head = {"language": 0, "masked_language": d * d + 3 * d + vocab,
               "classification": d * d + d + classes * (d + 1)}
    positions = settings["model.length"] * d if settings.get("model.positions") == "learned" else 0
    return (vocab * d + positions + settings["model.layers"] * layer + 2 * d
            + of_head[settings.get("model.head", "language")])


def flops_of_token(settings, vocab):
    """6 for each weight of a product, the logits' included, and causal attention's two products there and back: of a
    language model."""
    d, layers, vocab = settings["model.width"], settings["model.layers"], settings.get("model.vocab") or vocab
    f = settings.get("model.ffn") or 4 * d
    return 6 * (layers * (4 * d * d + 2 * d * f) + vocab * d) + 6 * layers * d * settings["model.length"]


def published(file, a_run):
    """The paper's count for a model of its table, known by its name; None for others."""
    counts = PUBLISHED.get(file.shape())
    name = a_run.labels.get("model") or file.path.stem.partition("-")[2]
    return counts[VARIANTS[name]] if counts and name in VARIANTS else None


class Configs(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.files = all_files()

    def every_plan(self):
        """Each file with each of its runs: the run's settings and its plan."""
        return [(file, a_run, file.settings(a_run), plan) for file in self.files
                for a_run, plan in zip(file.runs, file.plans)]

    def test_parameters_are_those_of_the_paper(self):
        seen = set()
        for file, a_run, _, plan in self.every_plan():
            if (count := published(file, a_run)) is not None:
                self.assertEqual(plan.parameters, count, (file.path, a_run.name))
                seen.add(count)
        self.assertEqual(seen, {count for counts in PUBLISHED.values() for count in counts})

    def test_published_counts_are_those_that_the_paper_prints(self):
        for shape, counts in PUBLISHED.items():
            self.assertEqual(tuple(round(count / 1e6, 1) for count in counts), IN_MILLIONS[shape])
        wider = File(CONFIGS / "wider-780/baseline.toml")
        self.assertEqual(int(wider.plans[0].parameters / 1e6), 127)

    def test_parameters_and_flops_of_all_models_are_those_of_their_formulas(self):
        for file, a_run, settings, plan in self.every_plan():
            tokens = settings["train.updates"] * settings["train.global_batch"] * settings["model.length"]
            expected = (counted(settings, file.vocab), tokens)
            self.assertEqual((plan.parameters, plan.tokens), expected, (file.path, a_run.name))
            if file.is_language_model():
                flops = tokens * flops_of_token(settings, file.vocab)
                self.assertEqual(plan.flops, f"{flops:.2e}", (file.path, a_run.name))

    def test_headers_say_what_plans_say(self):
        for file in self.files:
            with self.subTest(file=file.path.relative_to(ROOT)):
                if file.is_language_model():
                    self.assertEqual(file.given_header(), file.expected_header(), "configs_test.py --write mends it")
                else:
                    self.assertIn(f"parameters  {file.plans[0].parameters:,}", file.header)

    def test_headers_name_their_file_and_its_runs(self):
        for file in self.files:
            with self.subTest(file=file.path.relative_to(ROOT)):
                tool = "launch/sweep" if file.is_sweep else r"(launch/run|mpirun -n \d+ normformer train)"
                self.assertRegex(file.header, rf"#   {tool} {file.path.relative_to(ROOT)}( |\n|$)")
                for number in re.findall(r"(\d+) runs", file.header.replace("\n#", "")):
                    self.assertEqual(int(number), len(file.runs))

    def test_runs_fit_their_gpus(self):
        for file in filter(File.is_on_gpus, self.files):
            with self.subTest(file=file.path.relative_to(ROOT)):
                self.assertLess(max(plan.memory for plan in file.plans) / GIB, OWN_GIB)
                for name, (_, limit, memory) in file.layouts().items():
                    self.assertLess(memory / GIB, limit, name)

    def test_every_layout_is_for_some_model_and_says_for_which_gpus(self):
        self.assertEqual({path.stem for path in LAYOUTS.glob("*.toml")}, set(FOR_LAYOUTS))
        for name, (gpus, limit, _) in FOR_LAYOUTS.items():
            said = (LAYOUTS / f"{name}.toml").read_text().replace("\n#", "")
            of_gpus = r"(?:(\d+) hosts|one node|on one) ?(?:of (\d+))? GPUs? with (\d+) GB"
            hosts, of_each, size = re.search(of_gpus, said).groups()
            self.assertEqual(int(hosts or 1) * int(of_each or 1), gpus)
            self.assertLess(limit, int(size))


if __name__ == "__main__":
    if "--write" in sys.argv[1:]:
        for one in filter(File.is_language_model, all_files()):
            one.write()
    else:
        sys.exit(unittest.main(verbosity=2))
