#!/usr/bin/env python3
"""Checks the program on this machine's GPU: the half of launch/gpu-check that runs where the GPU is.

    run [--only NAME[,NAME]] [--skip NAME[,NAME]] [--quick] [--output FOLDER]

Prints what the machine has, then runs the checks, each within a time limit of its own, whatever became of those before:

    unit       the operations', groups' and libraries' test programs
    oracle     the model against the numbers of another implementation
    memcheck   compute-sanitizer over small models and attention: accesses out of bounds
    racecheck  the same: races on shared memory
    losses     short trainings beside the CPU's, twice, and over ranks
    step       speed and memory of a training step, baseline and NormFormer
    torch      the same step in PyTorch
    bandwidth  element-wise kernels beside a copy

A NAME is a part or, with * and ? for wildcards, a check, such as step/1.3B* or losses/test_125m_bf16. --quick chooses what
takes a few minutes. FOLDER keeps every log, results.json and results.md; checks that an earlier run of the same commit on
the same kind of GPU left there stay in its table, so that the parts can be run one at a time.

Exit status: 0 nothing failed (a missed goal is no failure), or there is no GPU; 1 something failed; 2 bad usage.
"""
import argparse
import collections
import dataclasses
import datetime
import fnmatch
import glob
import json
import os
import pathlib
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time

PARTS = ("unit", "oracle", "memcheck", "racecheck", "losses", "step", "torch", "bandwidth")
SKIPPED = 77  # exit status of a test program that has nothing to run on
# TFLOP/s that the baseline is to reach, at length 2048 without dropout.
SIZES = {"125M": 360, "355M": 400, "1.3B": 500, "2.7B": 550}
MOST_TIME, MOST_MEMORY = 3.0, 5.0  # percent that NormFormer may take beyond the baseline
LEAST_RATIO = 1.1  # of our speed to PyTorch's
WIDTHS = (768, 2048, 2560, 3072, 8192)
QUICK_LOSSES = ("test_small_fp64", "test_same_bits", "test_ranks_by_nccl")
SANITIZED = {"models": ("oracle_test", "*OneRankBf16*:*OneRankFp32*normformer*"),
             "attention": ("ops_attention_test", "*"), "norms": ("ops_norm_test", "*"), "losses": ("ops_embedding_test", "*")}

Reading = collections.namedtuple("Reading", "result figures data", defaults=(None,))


@dataclasses.dataclass
class Check:
    """One command of the table. `command` may be a function, called when its turn comes; `read` reads its output."""
    part: str
    name: str
    command: object
    limit: int
    read: object
    environment: dict = dataclasses.field(default_factory=dict)
    quick: bool = True

    @property
    def id(self):
        return f"{self.part}/{self.name}"


# ---- what outputs say


def read_gtest(output):
    passed, failed, skipped = (max(map(int, re.findall(rf"\[ +{word} +\] (\d+) test", output)), default=0)
                               for word in ("PASSED", "FAILED", "SKIPPED"))
    if passed + failed + skipped == 0:
        return Reading("failed", "no test ran")
    figures = f"{passed} tests passed"
    figures += "".join(f", {count} {what}" for count, what in ((failed, "failed"), (skipped, "skipped")) if count)
    return Reading("failed" if failed else "passed" if passed else "skipped", figures)


def read_sanitizer(output):
    summary = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (\d+) .*", output)
    if "Device not supported" in output:
        return Reading("skipped", "compute-sanitizer: Device not supported")
    if not summary:
        return Reading("failed", "compute-sanitizer gave no summary")
    tests = read_gtest(output)
    return Reading("failed" if any(map(int, summary)) else tests.result, f"{summary[-1]} errors; {tests.figures}")


def read_losses(output):
    skipped = re.search(r"skipped ['\"](.*)['\"]", output)
    if skipped and re.search(r"^OK \(skipped", output, re.M):
        return Reading("failed" if "Ran 0 tests" in output else "skipped", skipped[1])
    worst = {}
    compared = re.findall(r"figures: .*?(fp64|fp32|bf16): losses to (\S+) .*gradient norms to (\S+) ", output)
    for precision, loss, norm in compared:
        before = worst.get(precision, (0.0, 0.0))
        worst[precision] = (max(before[0], float(loss)), max(before[1], float(norm)))
    said = [f"{precision}: losses to {loss:.1e}, gradient norms to {norm:.1e}"
            for precision, (loss, norm) in worst.items()]
    said += re.findall(r"figures: (.* (?:equal|DIFFER))$", output, re.M)
    return Reading("passed" if said else "failed", "; ".join(said) or "no figures")


def step_lines(output):
    """The lines of bench_gpu_step or torch_step.py, by model."""
    lines = {}
    for line in output.splitlines():
        fields = line.split()
        if len(fields) >= 15 and fields[1] in ("baseline", "normformer") and re.fullmatch(r"\d+x\d+", fields[2]):
            micro_batch, micro_batches = map(int, fields[2].split("x"))
            lines[fields[1]] = {"micro_batch": micro_batch, "micro_batches": micro_batches, "speed": float(fields[6]),
                                "tflops": float(fields[7]), "gib": float(fields[12])}
    return lines


def percent_more(value, base):
    return 100.0 * (value / base - 1.0)


def read_step(output, goal):
    lines = step_lines(output)
    figures = [line.strip() for line in output.splitlines() if " failed: " in line]
    missed = False
    if "baseline" in lines:
        base = lines["baseline"]
        missed = goal is not None and base["tflops"] < goal
        figures.append(f"baseline {base['tflops']:.1f} TFLOP/s" + (f" (goal {goal})" if goal else "") +
                       f", {base['gib']:.1f} GiB")
    if "normformer" in lines:
        ours = lines["normformer"]
        figures.append(f"NormFormer {ours['tflops']:.1f} TFLOP/s, {ours['gib']:.1f} GiB")
    if len(lines) == 2:
        slower = percent_more(base["speed"], ours["speed"])
        missed = missed or slower > MOST_TIME
        figures.append(f"time {slower:+.1f} % (goal at most {MOST_TIME:+.0f} %)")
        if ours["micro_batch"] == base["micro_batch"]:
            larger = percent_more(ours["gib"], base["gib"])
            missed = missed or larger > MOST_MEMORY
            figures.append(f"memory {larger:+.1f} % (goal at most {MOST_MEMORY:+.0f} %)")
    return Reading("failed" if len(lines) < 2 else "goal missed" if missed else "passed", "; ".join(figures), lines)


def read_torch(output, ours):
    lines = step_lines(output)
    figures = [line.strip() for line in output.splitlines() if " failed: " in line]
    missed = False
    for model, line in lines.items():
        said = f"{model}: PyTorch {line['tflops']:.1f} TFLOP/s"
        if model in ours:
            ratio = ours[model]["speed"] / line["speed"]
            missed = missed or ratio < LEAST_RATIO
            said += f", ours {ratio:.2f} x that (goal {LEAST_RATIO})"
        figures.append(said)
    if not ours:
        figures.append("ours was not measured")
    return Reading("failed" if not lines else "goal missed" if missed else "passed", "; ".join(figures))


def read_bandwidth(output):
    kernels, kind = [], ""
    for line in output.splitlines():
        heading = re.fullmatch(r"(\w+) \d+ x \d+", line.strip())
        kernel = re.fullmatch(r"  (\S.*?) +[\d.]+ ms +[\d.]+ GB/s, copy +([\d.]+) GB/s: +(\d+) %", line)
        if heading:
            kind = heading[1]
        elif kernel:
            kernels.append((int(kernel[3]), f"{kernel[1]} {kind}", float(kernel[2])))
    if not kernels:
        return Reading("failed", "no figures")
    lowest = ", ".join(f"{name} {share} %" for share, name, _ in sorted(kernels)[:3])
    median, copy = statistics.median(k[0] for k in kernels), max(k[2] for k in kernels)
    return Reading("passed", f"{median:.0f} % of a copy's {copy:.0f} GB/s in the median of {len(kernels)}; lowest: {lowest}")


# ---- what the machine has


def said_by(*command, environment=None):
    """What a command writes; empty where it is missing, fails or takes too long."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=120, env=environment,
                              stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def library_folders():
    """Where CUDA's libraries may be: system folders first, then those of Python packages."""
    folders = os.environ.get("LD_LIBRARY_PATH", "").split(":")
    folders += [os.path.dirname(path) for path in re.findall(r"=> (/\S+)", said_by("ldconfig", "-p") or
                                                             said_by("/sbin/ldconfig", "-p"))]
    patterns = ["/usr/local/cuda*/lib64", "/usr/local/cuda*/lib", "/usr/local/cuda*/targets/*/lib",
                "/usr/local/nvidia/lib64"]
    packages = said_by("python3", "-c", "import sys; print('\\n'.join(sys.path))").split() + sys.path
    for pattern in patterns + [os.path.join(path, "nvidia", "*", "lib") for path in packages if path]:
        folders += sorted(glob.glob(pattern))
    return list(dict.fromkeys(folder for folder in folders if os.path.isdir(folder)))


def find_tool(name, *patterns):
    return shutil.which(name) or next((path for pattern in patterns for path in sorted(glob.glob(pattern))), None)


class Machine:
    """The environment in which the bundle's programs run here, and what was found for them."""

    def __init__(self, bundle, manifest):
        self.bundle = bundle
        self.gpus = said_by("nvidia-smi", "--query-gpu=name,driver_version,memory.total",
                            "--format=csv,noheader").splitlines()
        self.sanitizer = find_tool("compute-sanitizer", "/usr/local/cuda*/bin/compute-sanitizer",
                                   "/opt/nvidia/*/compute-sanitizer")
        # PyTorch brings CUDA libraries of its own and must not meet others.
        self.torch = said_by("python3", "-c", "import torch; print(torch.__version__, 'sees' if torch.cuda.is_available() "
                                              "else 'does not see', 'the GPU')")
        self.libraries = self.find_libraries(manifest["cuda_libraries"])
        self.environment = self.make_environment()
        self.lacking = self.find_lacking()
        self.found = self.describe()

    def find_libraries(self, names):
        folders = [str(self.bundle / "lib"), *library_folders()]
        return {name: next((folder for folder in folders if os.path.exists(os.path.join(folder, name))), None)
                for name in [*names, "libcuda.so.1"]}

    def make_environment(self):
        environment = dict(os.environ, NORMFORMER_PROGRAM=str(self.bundle / "bin" / "normformer"),
                           NORMFORMER_TEST_FIXTURES=str(self.bundle / "tests" / "fixtures"), GTEST_COLOR="no")
        found = [folder for folder in self.libraries.values() if folder]
        given = [folder for folder in os.environ.get("LD_LIBRARY_PATH", "").split(":") if folder]
        environment["LD_LIBRARY_PATH"] = ":".join(dict.fromkeys([str(self.bundle / "lib"), *found, *given]))
        if (self.bundle / "openmpi").is_dir():
            environment["OPAL_PREFIX"] = str(self.bundle / "openmpi")
            environment["PMIX_MCA_pcompress_base_silence_warning"] = "1"  # its compression is left behind
            environment["PATH"] = f"{self.bundle / 'openmpi' / 'bin'}:{environment['PATH']}"
        if os.getuid() == 0:
            environment.update(OMPI_ALLOW_RUN_AS_ROOT="1", OMPI_ALLOW_RUN_AS_ROOT_CONFIRM="1")
        return environment

    def find_lacking(self):
        """Libraries that the loader does not find for the bundle's programs."""
        environment = dict(self.environment, LD_TRACE_LOADED_OBJECTS="1")
        return sorted({name for program in sorted((self.bundle / "bin").iterdir())
                       for name in re.findall(r"(\S+) => not found", said_by(str(program), environment=environment))})

    def describe(self):
        mpi = said_by("mpirun", "--version", environment=self.environment).splitlines()
        found = [("GPU", gpu) for gpu in self.gpus]
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        found.append(("host", f"{os.cpu_count()} cores, {memory >> 30} GiB"))
        found += [(name, folder or "not found") for name, folder in self.libraries.items()]
        found.append(("MPI", mpi[0] if mpi else "no mpirun"))
        found.append(("PyTorch", self.torch or "not installed"))
        found.append(("compute-sanitizer", self.sanitizer or "not found"))
        found.append(("programs", "lack " + ", ".join(self.lacking) if self.lacking else "find all their libraries"))
        return found


# ---- the checks


class Checks:
    """All checks of the table, in its order."""

    def __init__(self, bundle, manifest, machine, rows, quick):
        self.bundle, self.manifest, self.machine, self.rows, self.quick = bundle, manifest, machine, rows, quick

    def all(self):
        return [check for part in PARTS for check in getattr(self, part)()]

    def program(self, name):
        return str(self.bundle / "bin" / name)

    def tests(self, part, chosen):
        for test in self.manifest["tests"]:
            if chosen(test["name"]):
                command = [self.program(word[4:]) if word.startswith("bin/") else word for word in test["command"]]
                filters = ["--gtest_filter=*OneRank*"] if part == "oracle" and self.quick else []
                yield Check(part, test["name"], command + filters, test["limit"], read_gtest, test["environment"])

    def unit(self):
        return self.tests("unit", lambda name: not name.startswith("oracle_test"))

    def oracle(self):
        return self.tests("oracle", lambda name: name.startswith("oracle_test"))

    def sanitized(self, tool):
        for name, (program, chosen) in SANITIZED.items():
            # Libraries try calls that fail; ours are all checked by the program itself.
            calls = ["--report-api-errors", "no"] if tool == "memcheck" else []
            command = [self.machine.sanitizer, "--tool", tool, "--error-exitcode", "9", *calls, self.program(program),
                       f"--gtest_filter={chosen}"]
            if not self.machine.sanitizer:
                command = ["echo", "skipped: compute-sanitizer was not found"]
            yield Check(tool, name, command, 900, read_sanitizer, {"NORMFORMER_TEST_DEVICE": "cuda"}, name == "models")

    def memcheck(self):
        return self.sanitized("memcheck")

    def racecheck(self):
        return self.sanitized("racecheck")

    def losses(self):
        script = self.bundle / "tests" / "integration" / "gpu_losses_test.py"
        for name in re.findall(r"^    def (test_\w+)", script.read_text(), re.M):
            yield Check("losses", name, ["python3", str(script), f"Losses.{name}"], 1800, read_losses,
                        quick=name in QUICK_LOSSES)

    def variants(self):
        """Size, length, dropout; whether it belongs to the quick selection."""
        for size in SIZES:
            for length in (2048, 1024) if size == "125M" else (2048,):
                for dropout in ("0", "0.1"):
                    yield size, length, dropout, length == 2048 and (size == "125M" or (size, dropout) == ("1.3B", "0"))

    @staticmethod
    def variant_name(size, length, dropout):
        return f"{size} length {length} dropout {dropout}"

    def step(self):
        for size, length, dropout, quick in self.variants():
            command = [self.program("bench_gpu_step"), "--size", size, "--length", str(length), "--dropout", dropout]
            command += ["--steps", "5"] if self.quick else []
            goal = SIZES[size] if (length, dropout) == (2048, "0") else None
            yield Check("step", self.variant_name(size, length, dropout), command, 600,
                        lambda output, goal=goal: read_step(output, goal), quick=quick)

    def measured(self, variant):
        """What bench_gpu_step measured of a variant, by model."""
        return (self.rows.get(f"step/{variant}") or {}).get("data") or {}

    def torch(self):
        script = str(self.bundle / "benchmarks" / "torch_step.py")
        for size, length, dropout, quick in self.variants():
            variant = self.variant_name(size, length, dropout)

            def command(size=size, length=length, dropout=dropout, variant=variant):
                if not self.machine.torch:
                    return ["echo", "skipped: PyTorch is not installed"]
                made = ["python3", script, "--size", size, "--length", str(length), "--dropout", dropout]
                ours = min(self.measured(variant).values(), key=lambda line: line["micro_batch"], default=None)
                if ours:  # its own choice of a batch does not look at the memory there is
                    made += ["--micro-batch", str(ours["micro_batch"]), "--micro-batches", str(ours["micro_batches"])]
                return made

            yield Check("torch", variant, command, 900,
                        lambda output, variant=variant: read_torch(output, self.measured(variant)),
                        {"LD_LIBRARY_PATH": os.environ.get("LD_LIBRARY_PATH", "")}, quick and dropout == "0")

    def bandwidth(self):
        for width in WIDTHS:
            yield Check("bandwidth", f"width {width}",
                        [self.program("bench_ops_elementwise"), "--device", "cuda", "--columns", str(width)], 300,
                        read_bandwidth, quick=width == 2048)


def stop(process):
    """Ends a process and those it started."""
    for how, patience in ((signal.SIGTERM, 5), (signal.SIGKILL, 5)):
        try:
            os.killpg(process.pid, how)
            process.wait(patience)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            pass


def execute(command, limit, environment, log):
    """The command's exit status, None where its time ran out; its output goes to `log`."""
    with open(log, "wb") as out:
        out.write(f"$ {' '.join(command)}\n".encode())
        out.flush()
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=environment,
                                   start_new_session=True)
        try:
            return process.wait(limit)
        except subprocess.TimeoutExpired:
            return None
        finally:
            stop(process)


def read(check, output):
    try:
        return check.read(output)
    except (ArithmeticError, LookupError, ValueError) as error:
        return Reading("failed", f"its output is not understood: {error}")


def judge(check, status, output):
    skipped = re.search(r"^skipped: (.*)", output, re.M)
    if skipped and status in (0, SKIPPED):
        # There is one: nvidia-smi lists it.
        return Reading("failed" if skipped[1].startswith("no GPU") else "skipped", skipped[1])
    reading = read(check, output)
    if status == 0 or (status is not None and reading.result == "skipped"):
        return reading
    why = f"stopped after {check.limit} s" if status is None else f"exit status {status}"
    said = output.strip().splitlines()[1:] or ["no output"]
    more = said[-1][:200] if reading.figures.startswith("no ") else reading.figures
    return Reading("failed", f"{why}; {more}", reading.data)


def perform(check, machine, output_folder):
    command = check.command() if callable(check.command) else check.command
    log = output_folder / (re.sub(r"[^\w.]+", "-", check.id) + ".log")
    started = time.monotonic()
    try:
        status = execute(command, check.limit, {**machine.environment, **check.environment}, log)
        reading = judge(check, status, log.read_text(errors="replace"))
    except OSError as error:
        reading = Reading("failed", str(error))
    return {"result": reading.result, "figures": reading.figures, "seconds": round(time.monotonic() - started),
            "data": reading.data}


# ---- the table


def table(rows):
    lines = ["| part | result | figures | s |", "|---|---|---|---|"]
    for name, row in rows.items():
        lines.append(f"| {name} | {row['result']} | {row['figures'].replace('|', '/')} | {row['seconds']} |")
    return lines


def tally(rows):
    counts = collections.Counter(row["result"] for row in rows.values())
    return (f"{counts['passed']} passed, {counts['failed']} failed, {counts['skipped']} skipped, "
            f"{counts['goal missed']} missed a goal")


def write_results(folder, manifest, machine, rows, order):
    """results.json, and results.md to paste into docs/gpu-results.md."""
    ordered = {name: rows[name] for name in sorted(rows, key=lambda name: order.get(name, len(order)))}
    key = {"commit": manifest["commit"], "gpu": machine.gpus[0].split(",")[0]}
    (folder / "results.json").write_text(json.dumps({**key, "rows": ordered}, indent=1))
    now = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    lines = [f"## {key['gpu']}, {now}, commit {manifest['commit']}", "", f"Built {manifest['built']}.", "",
             "| found | |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in machine.found]
    lines += ["", *table(ordered), "", tally(ordered)]
    (folder / "results.md").write_text("\n".join(lines) + "\n")
    return ordered


def earlier_rows(folder, manifest, machine):
    """What an earlier run left in the folder, if it was of the same commit on the same kind of GPU."""
    try:
        earlier = json.loads((folder / "results.json").read_text())
    except (OSError, ValueError):
        return {}
    same = (earlier["commit"], earlier["gpu"]) == (manifest["commit"], machine.gpus[0].split(",")[0])
    return earlier["rows"] if same else {}


def matches(check, names):
    return any(check.part == name or fnmatch.fnmatchcase(check.id, name) for name in names)


def choose(checks, options):
    """The checks asked for. Raises SystemExit(2) at a name that is none's."""
    for name in options.only + options.skip:
        if not any(matches(check, [name]) for check in checks):
            print(f"no check is named {name}; there are {', '.join(PARTS)}, and\n  " +
                  "\n  ".join(check.id for check in checks), file=sys.stderr)
            raise SystemExit(2)
    return [check for check in checks if (not options.only or matches(check, options.only)) and
            not matches(check, options.skip) and (check.quick or not options.quick)]


def add_options(parser):
    """The options of the checking half."""
    def names(text):
        return text.split(",")
    parser.add_argument("--only", type=names, default=[], metavar="NAME[,NAME]", help="these parts or checks alone")
    parser.add_argument("--skip", type=names, default=[], metavar="NAME[,NAME]", help="all but these")
    parser.add_argument("--quick", action="store_true", help="what takes a few minutes")
    parser.add_argument("--output", metavar="FOLDER", help="keeps logs and results")


def main():
    parser = argparse.ArgumentParser(prog="run", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=pathlib.Path)
    add_options(parser)
    options = parser.parse_args()
    bundle = options.bundle.absolute()
    folder = pathlib.Path(options.output or bundle / "results").absolute()
    manifest = json.loads((bundle / "checks.json").read_text())
    machine = Machine(bundle, manifest)
    print(f"commit {manifest['commit']}, built {manifest['built']}")
    for name, value in machine.found:
        print(f"  {name:<18} {value}")
    rows = earlier_rows(folder, manifest, machine) if machine.gpus else {}
    every = Checks(bundle, manifest, machine, rows, options.quick).all()
    chosen = choose(every, options)
    if not machine.gpus:
        print("no GPU: nvidia-smi is missing or finds none; nothing was checked")
        return 0
    folder.mkdir(parents=True, exist_ok=True)
    order = {check.id: at for at, check in enumerate(every)}
    failed = 0
    for check in chosen:
        print(f"== {check.id}", flush=True)
        rows[check.id] = row = perform(check, machine, folder)
        failed += row["result"] == "failed"
        print(f"   {row['result']}: {row['figures']} ({row['seconds']} s)", flush=True)
        ordered = write_results(folder, manifest, machine, rows, order)
    print("", *table(ordered), "", f"logs and results.md are in {folder}", tally(ordered), sep="\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
