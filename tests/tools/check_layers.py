#!/usr/bin/env python3
"""Fails where a file includes a room above its own floor or beside it, or a vendor's header outside its folder.

check_layers.py ROOT          checks the tree
check_layers.py --self-test   shows on small trees that each kind of breach is caught
"""
import pathlib
import re
import sys
import tempfile

FLOORS = [
    ["core"],
    ["config", "tensor"],
    ["ops", "comm"],
    ["mesh"],
    ["tensor_parallel", "context_parallel", "pipeline", "sharding"],
    ["model", "data", "checkpoints"],
    ["training"],
    ["evaluation", "planning"],
    ["app"],
]
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}

# Folders of parallel/ and the rooms that they are.
PARALLEL = {"tensor": "tensor_parallel", "comm": "comm", "mesh": "mesh", "pipeline": "pipeline",
            "sharding": "sharding", "context": "context_parallel"}

# A vendor's headers, and the beginnings of the paths that may include them.
VENDORS = [
    (r"mpi\.h|mpi-ext\.h", ("parallel/comm/mpi/",)),
    (r"nccl\w*\.h", ("parallel/comm/nccl/",)),
    (r"cu(da|blas|dnn|rand|solver|sparse|fft)[\w/]*\.h(pp)?|cuda/.*|cub/.*|thrust/.*|nv(tx|ml|rtc)[\w/]*\.h(pp)?",
     ("src/tensor/cuda/", "src/ops/cuda/", "parallel/comm/nccl/")),
    (r"(oneapi/)?dnnl.*", ("src/ops/cpu/onednn",)),
    (r"cblas\w*\.h|openblas\w*\.h|openblas/.*", ("src/ops/cpu/",)),
    (r"toml\+\+/.*|toml\.hpp", ("src/config/",)),
    (r"hwy/.*", ("src/ops/cpu/",)),
]

INCLUDE = re.compile(r'^\s*#\s*include\s*([<"])([^>"]+)[>"]')
# Which compiler reads a header is no flag: nvcc reads some of them for kernels.
BUILD_FLAG = re.compile(r"^\s*#\s*(if|ifdef|ifndef|elif)\b(?!\s+__CUDACC__\b)")
SUFFIXES = {".h", ".hpp", ".cuh", ".cpp", ".cc", ".cu"}


def room_of(path):
    """The room that a path from the root belongs to; None for paths outside the rooms."""
    parts = path.split("/")
    if parts[0] == "checkpoints" and len(parts) > 1:
        return "checkpoints"
    if parts[:2] == ["include", "normformer"] and len(parts) > 3:
        return parts[2]
    if parts[0] == "src" and len(parts) > 2:
        return parts[1]
    if parts[0] == "parallel" and len(parts) > 2:
        return PARALLEL.get(parts[1], parts[1])
    return None


def included_path(root, file, name):
    """Where a quoted include leads, from the root; None for what is not in the tree."""
    if name.startswith("normformer/"):
        return "include/" + name
    for base in (file.parent, root):
        target = (base / name).resolve()
        if target.is_file() and target.is_relative_to(root):
            return target.relative_to(root).as_posix()
    return None


def check_include(root, file, rel, room, name):
    """What is wrong with one include; a list of sentences."""
    found = []
    for pattern, homes in VENDORS:
        if re.fullmatch(pattern, name) and not rel.startswith(homes):
            found.append(f"{name} may be included only under {' and '.join(homes)}")
    target = included_path(root, file, name)
    other = room_of(target) if target else None
    if other is None or other == room:
        return found
    if other not in FLOOR:
        found.append(f"{name} is in no known room")
    elif FLOOR[other] > FLOOR[room]:
        found.append(f"{room} (floor {FLOOR[room]}) may not include {other} (floor {FLOOR[other]}): {name}")
    elif FLOOR[other] == FLOOR[room]:
        found.append(f"{room} and {other} share floor {FLOOR[room]} and may not see each other: {name}")
    return found


def check(root):
    root = pathlib.Path(root).resolve()
    breaches = []
    files = [f for top in ("include", "src", "parallel", "checkpoints") for f in (root / top).rglob("*")
             if f.suffix in SUFFIXES]
    for file in sorted(files):
        rel = file.relative_to(root).as_posix()
        room = room_of(rel)
        if room not in FLOOR:
            breaches.append(f"{rel}: is in no known room")
            continue
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
            if rel.startswith("include/") and BUILD_FLAG.match(line):
                breaches.append(f"{rel}:{number}: a public header may not depend on build flags")
            match = INCLUDE.match(line)
            if match:
                breaches += [f"{rel}:{number}: {what}" for what in check_include(root, file, rel, room, match[2])]
    return breaches, len(files)


# A file, a line of it, and what the check must say about it ("" for nothing).
CASES = [
    ("src/ops/a.cpp", '#include "normformer/tensor/t.h"', ""),
    ("src/ops/a.cpp", '#include "normformer/ops/t.h"', ""),
    ("parallel/tensor/a.cpp", '#include "normformer/mesh/t.h"', ""),
    ("parallel/tensor/a.cpp", '#include "normformer/tensor/t.h"', ""),
    ("checkpoints/a.cpp", '#include "normformer/sharding/t.h"', ""),
    ("src/app/a.cpp", "#include <vector>", ""),
    ("src/core/a.cpp", '#include "normformer/tensor/t.h"', "core (floor 0) may not include tensor (floor 1)"),
    ("include/normformer/core/a.h", '#  include <normformer/app/t.h>', "core (floor 0) may not include app"),
    ("src/tensor/a.cpp", '#include "normformer/tensor_parallel/t.h"', "tensor (floor 1) may not include tensor_par"),
    ("src/ops/a.cpp", '#include "normformer/comm/t.h"', "ops and comm share floor 2"),
    ("src/model/a.cpp", '#include "normformer/checkpoints/t.h"', "model and checkpoints share floor 5"),
    ("parallel/pipeline/a.cpp", '#include "normformer/model/t.h"', "pipeline (floor 4) may not include model"),
    ("parallel/pipeline/a.cpp", '#include "../../src/ops/cpu/inner.h"', ""),
    ("src/tensor/a.cpp", '#include "../ops/cpu/inner.h"', "tensor (floor 1) may not include ops (floor 2)"),
    ("src/core/a.cpp", '#include "src/ops/cpu/inner.h"', "core (floor 0) may not include ops (floor 2)"),
    ("src/cellar/a.cpp", "", "is in no known room"),
    ("parallel/cellar/a.cpp", "", "is in no known room"),
    ("src/a.cpp", "", "is in no known room"),
    ("src/app/a.cpp", '#include "normformer/cellar/t.h"', "is in no known room"),
    ("include/normformer/core/a.h", "#ifdef NORMFORMER_CUDA", "may not depend on build flags"),
    ("src/core/a.cpp", "#ifdef NORMFORMER_CUDA", ""),
    ("parallel/comm/mpi/a.cpp", "#include <mpi.h>", ""),
    ("parallel/comm/local/a.cpp", "#include <mpi.h>", "mpi.h may be included only under parallel/comm/mpi/"),
    ("include/normformer/comm/a.h", "#include <mpi.h>", "mpi.h may be included only under parallel/comm/mpi/"),
    ("parallel/comm/nccl/a.cpp", "#include <nccl.h>", ""),
    ("parallel/comm/mpi/a.cpp", "#include <nccl.h>", "nccl.h may be included only under parallel/comm/nccl/"),
    ("src/ops/cuda/a.cu", "#include <cuda_runtime.h>", ""),
    ("src/tensor/cuda/a.cpp", "#include <cuda/std/span>", ""),
    ("src/ops/a.cpp", "#include <cuda_runtime.h>", "cuda_runtime.h may be included only under"),
    ("src/ops/a.cpp", "#include <cublasLt.h>", "cublasLt.h may be included only under"),
    ("src/ops/cpu/onednn_matmul.cpp", "#include <dnnl.hpp>", ""),
    ("src/ops/cpu/onednn/a.cpp", "#include <oneapi/dnnl/dnnl.hpp>", ""),
    ("src/ops/cpu/matmul.cpp", "#include <dnnl.hpp>", "dnnl.hpp may be included only under src/ops/cpu/onednn"),
    ("src/config/a.cpp", "#include <toml++/toml.h>", ""),
    ("src/app/a.cpp", "#include <toml++/toml.h>", "toml++/toml.h may be included only under src/config/"),
    ("src/ops/cpu/a.cpp", "#include <hwy/highway.h>", ""),
    ("src/tensor/a.cpp", "#include <hwy/highway.h>", "hwy/highway.h may be included only under src/ops/cpu/"),
    ("src/ops/cpu/a.cpp", "#include <cblas.h>", ""),
    ("src/model/a.cpp", "#include <cblas.h>", "cblas.h may be included only under src/ops/cpu/"),
]


def self_test():
    wrong = 0
    for path, line, expected in CASES:
        with tempfile.TemporaryDirectory() as folder:
            root = pathlib.Path(folder)
            for name, text in (("src/ops/cpu/inner.h", ""), (path, f"// first\n{line}\n")):
                (root / name).parent.mkdir(parents=True, exist_ok=True)
                (root / name).write_text(text, encoding="utf-8")
            breaches, _ = check(root)
        good = not breaches if not expected else len(breaches) == 1 and expected in breaches[0]
        if not good:
            wrong += 1
            print(f"{path}: {line}\n  expected: {expected or 'nothing'}\n  found: {breaches}")
    print(f"{len(CASES) - wrong} of {len(CASES)} cases as expected")
    return wrong


def main():
    if sys.argv[1:] == ["--self-test"]:
        return 1 if self_test() else 0
    if len(sys.argv) != 2:
        print(__doc__)
        return 2
    breaches, files = check(sys.argv[1])
    print("\n".join(breaches) or f"{files} files keep to their floors")
    if not files:
        print(f"{sys.argv[1]} has no source files")
    return 1 if breaches or not files else 0


if __name__ == "__main__":
    sys.exit(main())
