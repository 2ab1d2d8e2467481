#!/usr/bin/env python3
"""Fails where a source file is not as clang-format leaves it, or a test is named in no CMakeLists.txt.

check_format.py ROOT          checks the tracked files of the tree
check_format.py --self-test   shows on small trees that each kind of breach is caught

Other versions of clang-format lay the same code out differently, so that only version 14 judges; without it the
formatting is skipped (exit status 77) once the tests are found to be registered.
"""
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

VERSION = 14
SKIPPED = 77
SUFFIXES = {".h", ".hpp", ".cuh", ".cpp", ".cc", ".cu"}
IGNORED_FOLDERS = {".git", "build", "install", "runs", "__pycache__", ".venv"}


def tracked_files(root):
    """The files that git tracks and that exist; every file where this is no git checkout."""
    git = shutil.which("git")
    if git:
        top = subprocess.run([git, "-C", root, "rev-parse", "--show-toplevel"], capture_output=True, text=True)
        if top.returncode == 0 and pathlib.Path(top.stdout.strip()).resolve() == root:
            listed = subprocess.run([git, "-C", root, "ls-files", "-z"], capture_output=True, check=True)
            return [root / name for name in listed.stdout.decode().split("\0") if name and (root / name).is_file()]
    files = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in IGNORED_FOLDERS]
        files += [pathlib.Path(folder) / name for name in names]
    return files


def formatter():
    """clang-format of the version that judges, or None."""
    for name in (f"clang-format-{VERSION}", "clang-format"):
        path = shutil.which(name)
        if not path:
            continue
        version = subprocess.run([path, "--version"], capture_output=True, text=True).stdout
        if re.search(rf"version {VERSION}\.", version):
            return path
    return None


def unformatted(root, files, tool):
    found = []
    for file in sorted(f for f in files if f.suffix in SUFFIXES):
        result = subprocess.run([tool, "--dry-run", "--Werror", "--style=file", file], capture_output=True, text=True)
        if result.returncode != 0:
            rel = file.relative_to(root)
            line = re.search(r":(\d+):\d+: error", result.stderr)
            found.append(f"{rel}:{line[1] if line else 1}: not formatted; run: clang-format -i {rel}")
    return found


def unregistered(root, files):
    """Tests under tests/ that no CMakeLists.txt names."""
    named = set()
    for file in files:
        if file.name != "CMakeLists.txt":
            continue
        text = re.sub(r"#.*", "", file.read_text(encoding="utf-8"))
        for word in re.findall(r"[^\s()\"]+_test\.cpp", text):
            word = re.sub(r"^\$\{CMAKE_CURRENT_(SOURCE|LIST)_DIR\}/", "", word)
            named.add((file.parent / word).resolve())
    tests = sorted(f for f in files if f.name.endswith("_test.cpp") and f.is_relative_to(root / "tests"))
    return [f"{f.relative_to(root)}: is named in no CMakeLists.txt, so that it never runs" for f in tests
            if f.resolve() not in named]


def self_test():
    cases = [
        ({"tests/a/x_test.cpp": "int a;\n", "tests/a/CMakeLists.txt": "nf_add_test(a SOURCES x_test.cpp)\n"}, ""),
        ({"tests/a/x_test.cpp": "int a;\n", "tests/CMakeLists.txt": "nf_add_test(a SOURCES a/x_test.cpp)\n"}, ""),
        ({"tests/a/x_test.cpp": "int a;\n", "tests/a/CMakeLists.txt": "# x_test.cpp\n"}, "named in no CMakeLists.txt"),
        ({"tests/a/x_test.cpp": "int a;\n", "tests/b/CMakeLists.txt": "f(x_test.cpp)\n"}, "named in no CMakeLists.txt"),
        ({"tests/a/x_test.cpp": "int a;\n"}, "named in no CMakeLists.txt"),
    ]
    if formatter():
        cases += [({"src/a.cpp": "int a;\n"}, ""), ({"src/a.cpp": "int  a;\n"}, "src/a.cpp:1: not formatted"),
                  ({"build/a.cpp": "int  a;\n"}, "")]
    wrong = 0
    for tree, expected in cases:
        with tempfile.TemporaryDirectory() as folder:
            root = pathlib.Path(folder).resolve()
            for name, text in tree.items():
                (root / name).parent.mkdir(parents=True, exist_ok=True)
                (root / name).write_text(text, encoding="utf-8")
            files = tracked_files(root)
            found = unregistered(root, files) + (unformatted(root, files, formatter()) if formatter() else [])
        good = not found if not expected else len(found) == 1 and expected in found[0]
        if not good:
            wrong += 1
            print(f"{tree}\n  expected: {expected or 'nothing'}\n  found: {found}")
    print(f"{len(cases) - wrong} of {len(cases)} cases as expected")
    return 1 if wrong else 0


def main():
    if sys.argv[1:] == ["--self-test"]:
        return self_test()
    if len(sys.argv) != 2:
        print(__doc__)
        return 2
    root = pathlib.Path(sys.argv[1]).resolve()
    files = tracked_files(root)
    tool = formatter()
    found = unregistered(root, files) + (unformatted(root, files, tool) if tool else [])
    if found:
        print("\n".join(found))
        return 1
    if not tool:
        print(f"tests are registered; formatting not checked: clang-format {VERSION} is not installed")
        return SKIPPED
    print(f"{sum(f.suffix in SUFFIXES for f in files)} source files are formatted and every test is registered")
    return 0


if __name__ == "__main__":
    sys.exit(main())
