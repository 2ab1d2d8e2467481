"""What the tests of the whole program share: running it, over ranks too, and small corpora."""
import json
import os
import pathlib
import re
import shutil
import struct
import subprocess
import tempfile
import time
import unittest

ROOT = pathlib.Path(__file__).resolve().parents[2]
PROGRAM = os.environ["NORMFORMER_PROGRAM"]

MODEL = {
    "model.layers": 3, "model.width": 24, "model.heads": 3, "model.length": 16, "model.head_scale": '"paper"',
    "model.post_attention_norm": "true", "model.ffn_norm": "true", "model.residual_scale": "true",
    "model.residual_dropout": 0.1, "model.attention_dropout": 0.1, "model.embedding_dropout": 0.1,
    "train.global_batch": 5, "train.micro_batch": 2, "train.updates": 12, "train.valid_sequences": 8,
    "optimizer.lr": 0.003, "optimizer.warmup_updates": 4, "optimizer.clip_norm": 1.0, "train.log_every": 100,
}


# tensor x context x pipeline x data
LAYOUTS = [(1, 1, 1, 1), (2, 1, 1, 1), (1, 1, 3, 1), (2, 1, 1, 2), (3, 1, 1, 1), (1, 3, 1, 1), (2, 2, 1, 1)]


def layout_flags(degrees):
    """What asks for one of these; where three ranks share a layer, they share the stream's tokens too."""
    flags = []
    for key, value in zip(("tensor", "context", "pipeline", "data"), degrees):
        flags += ["--set", f"parallel.{key}={value}"]
    if degrees[0] == 3:
        flags += ["--set", "parallel.sequence=true"]
    return flags


class Folder:
    """A temporary folder with a corpus in it, removed at the end."""

    def __enter__(self):
        self.path = pathlib.Path(tempfile.mkdtemp(prefix="normformer_test_"))
        text = "".join((ROOT / "docs" / name).read_text() for name in sorted(os.listdir(ROOT / "docs"))
                       if name.endswith(".md"))
        (self.path / "text.txt").write_text(text)
        run(["prepare", self.path / "text.txt", "--documents", "blank-lines", "--output", self.path / "corpus",
             "--train-vocab", 300, "--valid-fraction", 0.1], expect=0)
        return self

    def __exit__(self, *_):
        shutil.rmtree(self.path)

    def config(self, name, **changes):
        """Writes a configuration whose run's folder is `name`; keys are section__key."""
        keys = dict(MODEL)
        keys["data.train"] = f'"{self.path}/corpus_train"'
        keys["data.valid"] = f'"{self.path}/corpus_valid"'
        keys["checkpoint.folder"] = f'"{self.path}/{name}"'
        keys["device.threads"] = 1
        keys.update({key.replace("__", "."): value for key, value in changes.items()})
        sections = {}
        for key, value in keys.items():
            section, field = key.split(".")
            sections.setdefault(section, []).append(f"{field} = {value}")
        path = self.path / f"{name}.toml"
        path.write_text("\n".join(f"[{s}]\n" + "\n".join(lines) + "\n" for s, lines in sections.items()))
        return path


class WithCorpus(unittest.TestCase):
    """Tests that share one folder."""

    @classmethod
    def setUpClass(cls):
        cls.folder = Folder().__enter__()

    @classmethod
    def tearDownClass(cls):
        cls.folder.__exit__()


def environment():
    if os.getuid() == 0:
        return dict(os.environ, OMPI_ALLOW_RUN_AS_ROOT="1", OMPI_ALLOW_RUN_AS_ROOT_CONFIRM="1")
    return dict(os.environ)


def command(arguments, ranks=1):
    start = []
    if ranks > 1:
        start = ["mpirun", "--oversubscribe", "--bind-to", "none", "-n", str(ranks)]
    return [*start, PROGRAM, *map(str, arguments)]


class Outcome:
    def __init__(self, process):
        self.code, self.out, self.err = process.returncode, process.stdout, process.stderr

    def sentences(self):
        """What the program itself said on stderr, without mpirun's own epilogue."""
        return [line for line in self.err.splitlines() if line.startswith(("normformer:", "[rank"))]


def run(arguments, ranks=1, expect=None, timeout=120, **options):
    outcome = Outcome(subprocess.run(command(arguments, ranks), capture_output=True, text=True, errors="replace",
                                     timeout=timeout,
                                     env=environment(), **options))
    if expect is not None and outcome.code != expect:
        raise AssertionError(f"exit {outcome.code}, not {expect}: {arguments} on {ranks}\n{outcome.out}\n{outcome.err}")
    return outcome


def metrics(folder):
    """What a run measured: its metrics but for the line that tells what it trains."""
    path = pathlib.Path(folder) / "metrics.jsonl"
    if not path.exists():
        return []
    lines = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
    return [line for line in lines if line["kind"] != "run"]


def last_update(folder):
    """The update of the last line of a run's metrics, which may be long; 0 where there is none."""
    try:
        with open(pathlib.Path(folder) / "metrics.jsonl", "rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - 2000))
            found = re.findall(rb'"update":(\d+),.*\}\n', file.read())
    except OSError:
        return 0
    return int(found[-1]) if found else 0


def losses(folder):
    """Everything of a run's metrics that must have the same bits in two runs."""
    keys = ("kind", "batch", "update", "tokens", "loss", "gradient_norm", "lr", "skipped", "loss_scale", "overflows",
            "perplexity")
    return [{key: line.get(key) for key in keys} for line in metrics(folder)]


def weights(folder, dtype="f32"):
    """The bytes of a run's final weights, as `checkpoint export` writes them."""
    path = pathlib.Path(f"{folder}.safetensors")
    run(["checkpoint", "export", folder, path, "--dtype", dtype], expect=0)
    return path.read_bytes()


def read_safetensors(path):
    """Names to (type, shape, bytes): a reader of the format that is not the program's own."""
    raw = path.read_bytes()
    (size,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8:8 + size])
    header.pop("__metadata__", None)
    data = raw[8 + size:]
    return {name: (t["dtype"], t["shape"], data[slice(*t["data_offsets"])]) for name, t in header.items()}


def numbers(tensor):
    dtype, _, raw = tensor
    return struct.unpack(f"<{len(raw) // {'F32': 4, 'F64': 8}[dtype]}{'f' if dtype == 'F32' else 'd'}", raw)


def checkpoints(folder):
    """The steps of a run's published checkpoints."""
    path = pathlib.Path(folder) / "checkpoints"
    names = os.listdir(path) if path.exists() else []
    return sorted(int(name.removeprefix("step-").partition("-")[0]) for name in names if name.startswith("step-"))


def rank_processes(config, program=PROGRAM):
    """The processes that train a configuration, by rank."""
    found = {}
    for entry in filter(str.isdigit, os.listdir("/proc")):
        try:
            words = pathlib.Path(f"/proc/{entry}/cmdline").read_bytes().split(b"\0")
            values = pathlib.Path(f"/proc/{entry}/environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if str(program).encode() in words[:2] and str(config).encode() in words:
            found.update({int(v.partition(b"=")[2]): int(entry) for v in values if v.startswith(b"OMPI_COMM_WORLD_RANK=")})
    return found


def wait_until(condition, seconds=60):
    """Waits for a condition; whether it came."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.005)
    return False
