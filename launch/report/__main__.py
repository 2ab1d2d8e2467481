"""What `normformer report` starts: checks what Python has to bring, then runs report.main."""
import importlib.util
import pathlib
import sys

USAGE = 64

if sys.version_info < (3, 11):
    sys.exit(f"normformer: report needs Python 3.11 or newer, and {sys.executable} is "
             f"{sys.version.split()[0]}: name another in NORMFORMER_PYTHON")
for module, package in (("numpy", "python3-numpy"), ("matplotlib", "python3-matplotlib")):
    if importlib.util.find_spec(module) is None:
        print(f"normformer: report draws with {module}, which {sys.executable} does not have: "
              f"apt-get install {package}, or name a Python that has it in NORMFORMER_PYTHON", file=sys.stderr)
        sys.exit(USAGE)
sys.dont_write_bytecode = True
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from report.main import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
